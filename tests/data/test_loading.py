"""Loading in worker processes: the same bits for any number of them, and one sentence for whatever goes wrong."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vlprompt
from vlprompt.core.errors import ConfigError, DataError, UnknownNameError
from vlprompt.data import loading
from vlprompt.data.decoding import UndecodableError, read_image
from vlprompt.data.loading import Loader, Workers, check_workers, takes_workers, using_workers

COUNTS = (0, 1, 2, 4)


@dataclass(frozen=True)
class Reader:
    """Draws from its item, and fails where it is told."""

    fails: int = -1

    def __call__(self, item: int) -> dict[str, object]:
        if item == self.fails:
            read_image(f"/nowhere/{item}.jpg")
        generator = torch.Generator().manual_seed(item)
        pixels = torch.rand(2, 3, 8, 8, generator=generator)
        return {"image": pixels, "names": [str(item)], "process": os.getpid()}


def test_results_come_in_order_and_are_equal_for_any_number_of_workers() -> None:
    expected = [Reader()(i)["image"] for i in range(20)]
    for workers in COUNTS:
        with Loader(Reader(), workers=workers) as loader:
            results = list(loader.stream(range(20)))
            again = list(loader.stream(iter(range(5))))

        assert all(torch.equal(r["image"], e) for r, e in zip(results, expected, strict=True))
        assert [r["names"] for r in again] == [[str(i)] for i in range(5)]
        processes = {r["process"] for r in [*results, *again]} - {os.getpid()}
        assert len(processes) == workers  # they live as long as the loader


def test_loading_draws_no_number_from_torchs_own_stream() -> None:
    states = []
    for workers in (0, 2):
        torch.manual_seed(3)
        with Loader(Reader(), workers=workers) as loader:
            list(loader.stream(range(8)))
        states.append(torch.rand(4))
    assert torch.equal(*states)


def test_workers_end_with_their_loader() -> None:
    with Loader(Reader(), workers=2) as loader:
        results = loader.stream(range(100))
        pids = {next(results)["process"] for _ in range(5)} - {os.getpid()}
        results.close()
    assert pids
    deadline = time.monotonic() + 10
    while any(_runs(pid) for pid in pids):  # type: ignore[arg-type]
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("workers", COUNTS)
def test_an_error_in_a_worker_is_the_error_itself(workers: int) -> None:
    with Loader(Reader(fails=6), workers=workers) as loader, pytest.raises(UndecodableError) as caught:
        list(loader.stream(range(10)))
    assert str(caught.value) == "can't read the image /nowhere/6.jpg: the file does not exist."
    assert caught.value.reason == "the file does not exist"


def _raises(item: int) -> int:
    if item == 3:
        raise UnknownNameError("learner", "cop", ["coop"])
    if item == 4:
        raise ConfigError(["one", "two"], "a.yaml")
    if item == 5:
        raise KeyError("a bug")
    return item


@pytest.mark.parametrize("bad", [3, 4, 5])
def test_errors_of_every_kind_come_back_whole(bad: int) -> None:
    texts = []
    for workers in (0, 1):
        with Loader(_raises, workers=workers) as loader, pytest.raises((ValueError, KeyError)) as caught:
            list(loader.stream([1, bad]))
        texts.append((type(caught.value), str(caught.value)))
    assert texts[0] == texts[1]
    if bad == 5:
        assert "in _raises" in "".join(caught.value.__notes__)  # the lines where a fault of ours happened


def _kills(item: int) -> torch.Tensor:
    if item == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return torch.zeros(3)


def test_a_killed_worker_is_one_sentence_that_names_memory() -> None:
    def run() -> None:
        with Loader(_kills, workers=1) as loader:
            for _ in loader.stream(range(10)):
                time.sleep(0.02)

    with pytest.raises(
        DataError, match=r"(was killed|ended unexpectedly), most likely because memory ran out.*workers=1"
    ):
        run()


def test_little_shared_memory_is_said_and_changes_no_bit(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loading, "_free_shared_memory", lambda: 1000.0)
    with caplog.at_level(logging.WARNING), Loader(Reader(), workers=2) as loader:
        results = list(loader.stream(range(6)))
    assert all(torch.equal(r["image"], Reader()(i)["image"]) for i, r in enumerate(results))
    assert len(caplog.records) == 1
    assert "through a pipe" in caplog.text


def test_full_shared_memory_is_one_sentence() -> None:
    text = "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out"
    assert "/dev/shm, through which it hands over images, is full" in loading._death(RuntimeError(text))
    assert loading._death(RuntimeError("something else")) == ""


def test_workers_start_only_where_they_save_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_cores", lambda: 3)

    def started(seconds: list[float], left: int | None) -> int:
        loader = Loader(Reader(), workers="auto", start="fork")
        loader._seconds = seconds
        return loader._count(left)

    assert started([0.02, 0.02], 1000) == 3
    assert started([0.02, 0.02], 4) == 0  # a few images
    assert started([0.0001, 0.0001], 10**6) == 0  # cached features, small scenes
    assert started([0.05], 1000) == 0  # the first one may be slow for reasons of its own
    assert started([0.5], 1000) == 3
    assert started([0.5], 2) == 2
    assert started([0.02] * 5, None) == 0  # nobody knows how many there are: as much as was spent already
    assert started([0.02] * 50, None) == 3


@pytest.mark.parametrize("bad", [-1, 1.5, True, "many", None])
def test_an_impossible_number_of_workers_is_refused(bad: object) -> None:
    with pytest.raises(DataError, match="workers must be 'auto' or a whole number from 0 on"):
        check_workers(bad)


def test_an_argument_holds_for_all_that_a_function_loads() -> None:
    @takes_workers
    def load(*, workers: Workers | None = None) -> Workers:
        return Loader(Reader())._wanted

    assert load() == "auto"
    assert load(workers=3) == 3
    with using_workers(2):
        assert load() == 2
        assert load(workers=0) == 0
    assert load() == "auto"


@pytest.mark.parametrize("place", [1, 12])
def test_what_cannot_be_pickled_is_loaded_here_and_does_not_hang(
    place: int, caplog: pytest.LogCaptureFixture
) -> None:
    items = [*range(place), lambda: 2, *range(3)]
    with caplog.at_level(logging.WARNING), Loader(repr, workers=1) as loader:
        assert list(loader.stream(items)) == list(map(repr, items))
    assert "can't be sent to them" in caplog.text


# --- processes


def _in_a_daemon(answers: multiprocessing.Queue[object]) -> None:
    with Loader(Reader(), workers=2) as loader:
        answers.put([r["process"] for r in loader.stream(range(4))])


def test_a_daemonic_process_loads_by_itself() -> None:
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    process = context.Process(target=_in_a_daemon, args=(answers,), daemon=True)
    process.start()
    assert set(answers.get(timeout=60)) == {process.pid}
    process.join()


def _in_a_pool(_: int) -> int:
    with Loader(Reader(), workers=2) as loader:
        return len({r["process"] for r in loader.stream(range(8))} - {os.getpid()})


@pytest.mark.slow
def test_processes_of_an_executor_have_workers_too() -> None:
    from loky import ProcessPoolExecutor as Loky

    for pool in (Loky(1), ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))):
        with pool:
            assert pool.submit(_in_a_pool, 0).result(timeout=120) == 2


_TWO_THREADS = """
import os, torch
from vlprompt.data.loading import Loader
torch.set_num_threads(4)
x = torch.randn(600, 600, requires_grad=True)
(x @ x).square().mean().backward()     # OpenMP's and autograd's threads are there now
def fetch(i):
    y = torch.full((600, 600), float(i))
    return torch.nn.functional.interpolate((y @ y)[None, None], (64, 64), mode="bilinear"), torch.get_num_threads()
"""


def _run(code: str, tmp_path: Path, **kwargs: object) -> subprocess.CompletedProcess[str]:
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(code))
    root = Path(vlprompt.__file__).parent.parent
    return subprocess.run(
        [sys.executable, str(path)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(root)},
    )


def test_a_fork_beside_used_thread_pools_neither_hangs_nor_differs(tmp_path: Path) -> None:
    code = (
        _TWO_THREADS
        + """
with Loader(fetch, workers=2) as loader:
    results = list(loader.stream(range(8)))
assert all(threads == 1 for _, threads in results[1:])
assert all(torch.allclose(y, fetch(i)[0]) for i, (y, _) in enumerate(results))
print("done")
"""
    )
    done = _run(code, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


@pytest.mark.slow
@pytest.mark.parametrize("guarded", [True, False])
def test_spawned_workers_work_and_an_unguarded_script_loads_by_itself(guarded: bool, tmp_path: Path) -> None:
    body = """
    with Loader(fetch, workers=2, start="spawn") as loader:
        results = list(loader.stream(iter(range(6))))
    print([int(y) for y, _ in results], {pid for _, pid in results[1:]} == {os.getpid()})
    """
    head = """
import os, torch
from vlprompt.data.loading import Loader
def fetch(i):
    return torch.tensor(i * i), os.getpid()
"""
    code = head + ('if __name__ == "__main__":' if guarded else "if True:") + body
    done = _run(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"[0, 1, 4, 9, 16, 25] {not guarded}\n"
    assert ("no loading workers" in done.stderr) == (not guarded)
    assert "Traceback" not in done.stderr


def test_an_interrupt_ends_the_workers_without_their_tracebacks(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        import os, signal, sys, time, torch
        from vlprompt.data.loading import Loader
        # As in a terminal: a shell's background job is told to ignore Ctrl-C, and so are its children.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        def fetch(i):
            time.sleep(0.01)
            return torch.zeros(3), os.getpid()
        try:
            with Loader(fetch, workers=2) as loader:
                for i, (_, pid) in enumerate(loader.stream(range(10**6))):
                    if i < 6:
                        print(pid, flush=True)
        except KeyboardInterrupt:
            print("interrupted", flush=True)
            sys.exit(130)
        """)
    )
    root = Path(vlprompt.__file__).parent.parent
    process = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert process.stdout is not None
    pids = {int(process.stdout.readline()) for _ in range(6)} - {process.pid}
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "interrupted\n", "")
    assert pids
    assert not any(_runs(pid) for pid in pids)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        status = Path(f"/proc/{pid}/stat")
        return not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


# --- what is loaded


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Two classes of JPEGs, one of them damaged."""
    rng = np.random.default_rng(0)
    for i in range(24):
        folder = tmp_path / "photos" / ("cat", "dog")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3)).astype(np.uint8))
        coarse.resize((80, 60), Image.Resampling.BICUBIC).save(folder / f"{i:02d}.jpg")
    return tmp_path / "photos"


def _trained(photographs: Path, workers: int) -> tuple[dict[str, torch.Tensor], object, object]:
    """Return what a learner that touches the image tower learned, scores and predicts."""
    data = vlprompt.load_dataset(f"folder:{photographs}", "all")
    learner = vlprompt.create_learner("vpt", vlprompt.create_backbone("tiny"), data.classnames)
    options = {"epochs": 1, "batch_size": 6, "augmentation": "crop_flip", "views": 0, "callbacks": ()}
    vlprompt.fit(learner, data, workers=workers, **options)
    scores = vlprompt.evaluate(learner, data, batch_size=5, workers=workers)
    return (
        learner.trainable_state(),
        scores,
        vlprompt.predict(learner, str(photographs), workers=workers).rows,
    )


@pytest.mark.parametrize(
    "workers", [2, pytest.param(1, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
)
def test_training_scores_and_predictions_are_equal_for_any_number_of_workers(
    workers: int, photographs: Path
) -> None:
    expected, scores, rows = _trained(photographs, 0)
    state, *found = _trained(photographs, workers)
    assert all(torch.equal(value, expected[name]) for name, value in state.items())
    assert found == [scores, rows]


_RUN = """
import sys
import vlprompt
photographs, folder, workers, pause = sys.argv[1:]
from vlprompt.training.callbacks import Callback
class Slow(Callback):
    def on_step(self, trainer, losses):
        import time
        time.sleep(float(pause))
data = vlprompt.load_dataset(f"folder:{photographs}", "all")
learner = vlprompt.create_learner("vpt", vlprompt.create_backbone("tiny"), data.classnames)
vlprompt.fit(
    learner, data, folder=folder, resume=True, epochs=3, batch_size=2, augmentation="crop_flip", views=0,
    checkpoint_seconds=0, callbacks=[Slow()], workers=int(workers),
)
import torch
torch.save(learner.trainable_state(), folder + "/end.pt")
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_with_another_number_of_workers_to_the_same_bits(
    photographs: Path, tmp_path: Path
) -> None:
    root = Path(vlprompt.__file__).parent.parent

    def start(folder: str, workers: int, pause: float) -> subprocess.Popen[bytes]:
        arguments = [str(photographs), str(tmp_path / folder), str(workers), str(pause)]
        environment = {**os.environ, "PYTHONPATH": str(root)}
        return subprocess.Popen([sys.executable, "-c", _RUN, *arguments], env=environment)

    assert start("whole", 0, 0).wait() == 0
    killed = start("killed", 2, 0.2)
    while not list((tmp_path / "killed").rglob("*.safetensors")):
        assert killed.poll() is None
        time.sleep(0.05)
    time.sleep(1.0)  # some steps, not a whole epoch
    killed.kill()
    killed.wait()
    assert not (tmp_path / "killed" / "end.pt").exists()

    assert start("killed", 1, 0).wait() == 0
    whole, resumed = (torch.load(tmp_path / name / "end.pt") for name in ("whole", "killed"))
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_damaged_images_are_counted_the_same_in_workers(photographs: Path) -> None:
    for path in sorted(photographs.rglob("*.jpg"))[3:15:4]:
        path.write_bytes(path.read_bytes()[:200])
    learner = vlprompt.create_learner("zero_shot", vlprompt.create_backbone("tiny"), ["cat", "dog"])
    tables = [vlprompt.predict(learner, str(photographs), batch_size=4, workers=n).rows for n in COUNTS]
    assert sum(bool(row["error"]) for row in tables[0]) == 3
    assert tables[1:] == [tables[0]] * 3


def test_images_that_pillow_has_not_read_yet_go_through_workers(photographs: Path) -> None:
    learner = vlprompt.create_learner("zero_shot", vlprompt.create_backbone("tiny"), ["cat", "dog"])
    paths = sorted(photographs.rglob("*.jpg"))
    paths[5].write_bytes(paths[5].read_bytes()[:-200])

    def opened() -> Iterator[Image.Image]:
        return (Image.open(path) for path in paths)

    tables = [vlprompt.predict(learner, opened(), batch_size=4, workers=n).rows for n in (0, 2)]
    assert [bool(row["error"]) for row in tables[0]].index(True) == 5
    assert tables[0] == tables[1]
