"""A chat model as proposer and describer, over a real socket: bad days of a server, costs, and the key."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.text_search.conftest import CLASSES, ToyScorer
from tests.text_search.endpoint_server import Endpoint, serve
from vlprompt import load_dataset
from vlprompt.backbones import Backbone
from vlprompt.core.errors import ConfigError, UnknownNameError, VLPromptError
from vlprompt.text_search.budget import Budget, BudgetSpentError, Usage
from vlprompt.text_search.conversation import parse_reply
from vlprompt.text_search.describers import check_describer, create_describer, described
from vlprompt.text_search.loop import Outcome, Settings, search
from vlprompt.text_search.proposers import create_proposer
from vlprompt.text_search.templates import Rules
from vlprompt.text_search.transcript import Exchange, read_transcript

pytest.importorskip("openai")

KEY = "sk-a-secret-of-tests"
GOOD = json.dumps(["a sketch of a <CLASS>", "a <CLASS> on paper", "a dog beside a <CLASS>"])
BETTER = 'Sure! ```json\n["the sketch of a <CLASS> on paper."]\n```'
USAGE = {"prompt_tokens": 100, "completion_tokens": 20}


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_KEY", KEY)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def rules(backbone: Backbone) -> Rules:
    return Rules(backbone, CLASSES)


def _options(endpoint: Endpoint, **options: Any) -> dict[str, Any]:
    return {
        "model": "m",
        "base_url": endpoint.url,
        "key_variable": "TEST_KEY",
        "pause": 0.01,
        "max_retries": 2,
        **options,
    }


def _run(
    endpoint: Endpoint,
    rules: Rules,
    path: Path | None = None,
    steps: int = 2,
    budget: Budget | None = None,
    resume: bool = False,
    **options: Any,
) -> Outcome:
    outcome, transcript = search(
        ToyScorer({"sketch": 2.0, "on paper": 2.0}),
        create_proposer("chat", _options(endpoint, **options)),
        rules,
        ["a photo of a {}."],
        Settings(steps=steps, proposals=3, patience=9),
        budget=budget,
        transcript=path,
        resume=resume,
    )
    transcript.result({"templates": [outcome.candidates[0].template]})
    return outcome


def test_a_chat_model_is_asked_and_understood(rules: Rules, tmp_path: Path) -> None:
    with serve(GOOD, BETTER, usage=USAGE) as endpoint:
        outcome = _run(endpoint, rules, tmp_path / "t", prices=[10.0, 50.0])
    assert outcome.candidates[0].template == "the sketch of a {} on paper."
    assert outcome.usage == Usage(2, 200, 40, pytest.approx(200e-5 + 40 * 5e-5))
    assert endpoint.keys == [f"Bearer {KEY}"] * 2

    first, second = endpoint.bodies
    assert (first["model"], first["temperature"], first["max_tokens"]) == ("m", 1.0, 400)
    assert "a photo of a <CLASS>." in first["messages"][1]["content"]
    history = second["messages"][1]["content"]
    places = [
        history.index(t) for t in ("a photo of a <CLASS>.", "a <CLASS> on paper.", "a sketch of a <CLASS>.")
    ]
    assert places[0] == min(places)  # the worst first
    assert "beside" not in history
    assert "JSON list of 3 strings" in history

    _, steps, _ = read_transcript(tmp_path / "t")
    assert dict(steps[1].rejected) == {"a dog beside a <CLASS>": "it holds the class name 'dog'"}


def test_the_key_is_never_written(rules: Rules, tmp_path: Path) -> None:
    reply = f'the key is {KEY} ["a sketch of a <CLASS>"]'
    refusal = pytest.raises(VLPromptError, match="did not answer in 1 requests")
    with serve(reply, 401, usage=USAGE) as endpoint, refusal as caught:
        _run(endpoint, rules, tmp_path / "t")
    assert KEY not in str(caught.value)
    assert KEY not in (tmp_path / "t").read_text()
    assert "[key]" in (tmp_path / "t").read_text()


def test_a_bad_day_is_repeated_with_pauses_and_counted(rules: Rules, tmp_path: Path) -> None:
    with serve(500, "drop", GOOD, 429, BETTER, usage=USAGE) as endpoint:
        outcome = _run(endpoint, rules, tmp_path / "t")
    assert len(endpoint.bodies) == outcome.usage.requests == 5
    assert outcome.usage.tokens == 240
    assert outcome.candidates[0].template == "the sketch of a {} on paper."


def test_a_slow_server_is_given_up_in_time_and_asked_again(rules: Rules) -> None:
    with serve("slow", GOOD) as endpoint:
        outcome = _run(endpoint, rules, steps=1, timeout=0.3)
    assert outcome.usage.requests == 2
    assert outcome.usage.estimated  # it does not say what it read


def test_a_server_that_sends_a_byte_now_and_then_is_given_up(rules: Rules) -> None:
    began = time.monotonic()
    with serve("drip", GOOD) as endpoint:
        outcome = _run(endpoint, rules, steps=1, timeout=0.5)
    assert outcome.usage.requests == 2
    assert time.monotonic() - began < 20


def test_half_a_character_is_no_template(rules: Rules, tmp_path: Path) -> None:
    reply = 'half: \ud800 ["a sketch \ud83d of a <CLASS>", "a \\ud800 sketch of a <CLASS>", "a sketch of a <CLASS>"]'
    with serve(reply) as endpoint:
        outcome = _run(endpoint, rules, tmp_path / "t", steps=1)
    templates = [candidate.template for candidate in outcome.candidates]
    assert "a sketch of a {}." in templates
    assert all(template.isprintable() for template in templates)
    "".join(templates).encode()


def test_nobody_is_sent_elsewhere(rules: Rules) -> None:
    refusal = pytest.raises(VLPromptError, match="307")
    with serve("elsewhere") as endpoint, refusal:
        _run(endpoint, rules, budget=Budget(max_requests=3))
    assert len(endpoint.bodies) == 1


def test_a_failure_says_its_cause(rules: Rules) -> None:
    with serve(GOOD) as endpoint:
        pass
    with pytest.raises(VLPromptError, match="refused"):
        _run(endpoint, rules, max_retries=0)


@pytest.mark.parametrize(
    "address", ["localhost:11434/v1", "http://", "ftp://a/v1", "http://a:99999", "http://[::1", "http://a b"]
)
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(ConfigError, match="no address of a server"):
        create_proposer("chat", {"model": "m", "base_url": address, "key_variable": ""})


@pytest.mark.parametrize("key", [f"{KEY}\n", "schlüssel", "two words"])
def test_keys_that_are_none(key: str, rules: Rules, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_KEY", key)
    with serve(GOOD) as endpoint, pytest.raises(VLPromptError, match="TEST_KEY holds no key") as caught:
        _run(endpoint, rules)
    assert key.strip() not in str(caught.value)


@pytest.mark.parametrize(
    "nonsense",
    [
        "I would rather not.",
        'raw:{"hello": 1}',
        "raw:not json at all",
        f"raw:{'[' * 200_000}",
        "[1, 2]",
        '["a <CLA',
    ],
)
def test_nonsense_is_asked_again(nonsense: str, rules: Rules, tmp_path: Path) -> None:
    with serve(nonsense, GOOD, usage=USAGE) as endpoint:
        outcome = _run(endpoint, rules, tmp_path / "t", steps=1)
    assert len(endpoint.bodies) == 2
    assert len(outcome.candidates) == 3
    exchanges = [json.loads(line) for line in (tmp_path / "t").read_text().splitlines()]
    assert [record["kind"] for record in exchanges] == [
        "header",
        "step",
        "exchange",
        "exchange",
        "step",
        "result",
    ]


def test_nothing_but_nonsense_is_an_error_that_keeps_all_replies(rules: Rules, tmp_path: Path) -> None:
    with (
        serve("no.") as endpoint,
        pytest.raises(VLPromptError, match="not one template that could be scored"),
    ):
        _run(endpoint, rules, tmp_path / "t", attempts=2)
    assert len(endpoint.bodies) == 4
    assert (tmp_path / "t").read_text().count('"reply": "no."') == 4


def test_a_dead_server_loses_nothing_and_the_search_goes_on(rules: Rules, tmp_path: Path) -> None:
    path = tmp_path / "t"
    with serve(GOOD, 500, usage=USAGE) as endpoint:
        with pytest.raises(VLPromptError, match=r"m at 127.* did not answer in 3 requests: .*transcript"):
            _run(endpoint, rules, path)
        endpoint.plan[:] = [BETTER]
        outcome = _run(endpoint, rules, path, resume=True)
    assert len(endpoint.bodies) == 5  # 1 good, 3 that failed, 1 for the second step
    assert outcome.usage.requests == 5
    assert outcome.candidates[0].template == "the sketch of a {} on paper."


def test_a_paid_reply_is_used_after_a_kill(rules: Rules, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    with serve(GOOD, BETTER, usage=USAGE) as endpoint:
        _run(endpoint, rules, whole)
        part = tmp_path / "part"
        part.write_bytes(
            b"".join(whole.read_bytes().splitlines(keepends=True)[:5])
        )  # the second reply, not its step
        outcome = _run(endpoint, rules, part, resume=True)
        assert len(endpoint.bodies) == 2
    assert part.read_bytes() == whole.read_bytes()
    assert outcome.usage.requests == 2


def test_requests_never_exceed_the_budget(rules: Rules) -> None:
    with serve(GOOD, 500) as endpoint:
        outcome = _run(endpoint, rules, steps=9, budget=Budget(max_requests=3), max_retries=5)
    assert len(endpoint.bodies) == 3
    assert outcome.stopped == "the budget of 3 requests is spent"
    assert len(outcome.candidates) == 3


@pytest.mark.parametrize(
    ("limits", "stopped"),
    [({"max_tokens": 1500}, "1500 tokens"), ({"max_price": 0.01}, "a price of 0.01")],
)
def test_tokens_and_money_never_exceed_the_budget(limits: dict[str, Any], stopped: str, rules: Rules) -> None:
    with serve(GOOD, usage={"prompt_tokens": 500, "completion_tokens": 100}) as endpoint:
        budget = Budget(**limits)
        outcome = _run(endpoint, rules, steps=9, budget=budget, prices=[5.0, 5.0], max_output=100)
    assert outcome.stopped == f"the budget of {stopped} is spent"
    assert 1 <= len(endpoint.bodies) <= 3
    assert budget.spent.tokens == 600 * len(endpoint.bodies)
    assert budget.spent.tokens <= limits.get("max_tokens", 10**9)
    assert budget.spent.price <= limits.get("max_price", 10**9)


def test_a_budget_admits_what_fits_exactly() -> None:
    budget = Budget(max_requests=2, max_tokens=10)
    budget.admit(10)
    budget.spend(Usage(1, 4, 2))
    budget.admit(4)
    with pytest.raises(BudgetSpentError, match="10 tokens"):
        budget.admit(5)
    budget.spend(Usage(1))
    with pytest.raises(BudgetSpentError, match="2 requests"):
        budget.admit(1)


def test_a_missing_key_and_a_secret_address_are_refused(
    rules: Rules, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve(GOOD) as endpoint:
        monkeypatch.delenv("TEST_KEY")
        with pytest.raises(VLPromptError, match="environment variable TEST_KEY holds no key"):
            _run(endpoint, rules)
        assert _run(endpoint, rules, steps=1, key_variable="").candidates
        assert endpoint.keys == ["Bearer none"]
    for url in ("http://me:secret@host/v1", "http://host/v1?key=secret"):
        with pytest.raises(ConfigError, match="base_url: it holds a user or a query") as caught:
            create_proposer("chat", {"model": "m", "base_url": url})
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("reply", "texts"),
    [
        ('["a", " b "]', ["a", "b"]),
        ('{"templates": ["a"]}', ["a"]),
        ('see [1] and ["a"]', ["a"]),
        ("<template>a</template> or <TEMPLATE>\nb</TEMPLATE>", ["a", "b"]),
        ('["a", 3, null, ""]', ["a"]),
        ('["a", "b', []),
        ("<template>a", []),
        ("", []),
        ("[" * 5000, []),
    ],
)
def test_replies_are_read(reply: str, texts: list[str]) -> None:
    assert parse_reply(reply) == texts


def test_images_are_described_without_their_labels(tmp_path: Path) -> None:
    data = load_dataset("scenes/shape", "train", shots=1, seed=1)
    kept: list[Exchange] = []
    budget = Budget(max_requests=3)
    with serve("a blurry Circle on\nblue ground", "two", usage=USAGE) as endpoint:
        describer = create_describer("chat", _options(endpoint))
        texts = described(describer, data, 5, 1, [], kept.append, budget)
        assert texts == ["a blurry <CLASS> on blue ground", "two"]  # equal ones once; the budget ended it
        assert (budget.spent.requests, len(kept)) == (3, 3)

        again = described(describer, data, 3, 1, kept, kept.append, Budget(max_requests=1))
        assert again == texts
        assert len(endpoint.bodies) == 3

    content = endpoint.bodies[0]["messages"][0]["content"]
    assert content[1]["image_url"]["url"].startswith("data:image/png;base64,")
    asked = content[0]["text"].casefold()
    assert not any(name in asked for name in data.classnames)


def test_captions_and_lines_describe_too(tmp_path: Path) -> None:
    scenes = load_dataset("scenes/shape", "train", shots=1, seed=1)

    def texts(name: str, data: Any = scenes) -> list[str]:
        return described(create_describer(name, {}), data, 6, 1, [], lambda _: None, Budget())

    captions = texts("captions")
    assert len(captions) > 3
    assert captions == texts("captions")
    assert not any(name in caption for caption in captions for name in scenes.classnames if len(name) > 4)

    lines = tmp_path / "lines.txt"
    lines.write_text("a photo from above\n\n  a circle \n" + "long " * 100)
    assert texts(f"file:{lines}")[1] == "a <CLASS>"
    assert max(map(len, texts(f"file:{lines}"))) <= 300

    with pytest.raises(VLPromptError, match="brings no captions"):
        texts("captions", load_dataset("digits", "train", shots=1, seed=1))
    with pytest.raises(UnknownNameError, match=r"unknown describer 'caption'.*captions"):
        check_describer("caption", {})
    with pytest.raises(VLPromptError, match="can't be read"):
        texts(f"file:{tmp_path / 'none'}")


def test_large_images_are_shrunk_before_they_are_sent() -> None:
    from vlprompt.text_search.describers import _shrunk

    assert len(_shrunk(Image.new("RGB", (4000, 3000)))) < 4000
