"""A small WordNet in WordNet's own file format: two of ImageNet's classes for real, the others by numbers."""

from __future__ import annotations

from pathlib import Path

from vlprompt.data.imagenet import synset_ids

# synset: (words, hypernyms). 02099601 is ImageNet's golden retriever, 02123394 its Persian cat.
SYNSETS = {
    "00001740": (["entity"], []),
    "00015388": (["animal", "beast"], ["00001740"]),
    "02084071": (["dog", "domestic_dog"], ["00015388"]),
    "02099601": (["golden_retriever"], ["02084071"]),
    "02121808": (["house_cat", "cat"], ["00015388"]),
    "02123394": (["Persian_cat"], ["02121808"]),
    "02085374": (["toy_dog"], ["02084071"]),
    "09918248": (["cat", "guy"], ["00001740"]),
    "09918249": (["lapdog"], ["02084071"]),
}
# word: (senses, the most frequent first; how many of them its texts use)
INDEX = {
    "entity": (["00001740"], 1),
    "animal": (["00015388"], 1),
    "beast": (["00015388"], 0),
    "dog": (["02084071"], 1),
    "domestic_dog": (["02084071"], 0),
    "golden_retriever": (["02099601"], 0),
    "house_cat": (["02121808"], 0),
    "cat": (["09918248", "02121808"], 2),
    "guy": (["09918248"], 1),
    "persian_cat": (["02123394"], 0),
    "toy_dog": (["02085374"], 1),
    "lapdog": (["09918249"], 0),
}


def write_wordnet(folder: Path) -> Path:
    """Write ``data.noun`` and ``index.noun``."""
    folder.mkdir(parents=True, exist_ok=True)
    data = ["  1 This is the licence."]
    others = {
        i[1:]: ([f"class{i[1:]}"], ["00001740"]) for i in synset_ids("imagenet") if i[1:] not in SYNSETS
    }
    for synset, (words, parents) in {**SYNSETS, **others}.items():
        named = " ".join(f"{w} 0" for w in words)
        pointers = "".join(f" @ {p} n 0000" for p in parents)
        data.append(f"{synset} 03 n {len(words):02x} {named} {len(parents):03d}{pointers} | a gloss  ")
    index = ["  1 This is the licence."]
    for word, (senses, used) in INDEX.items():
        index.append(f"{word} n {len(senses)} 1 @ {len(senses)} {used} {' '.join(senses)}  ")
    (folder / "data.noun").write_text("\n".join(data) + "\n")
    (folder / "index.noun").write_text("\n".join(index) + "\n")
    return folder
