"""One study in each kind of storage, worked on by two commands at once; and storages that go away for a while."""

import contextlib
import multiprocessing
import os
import select
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import optuna
import pytest
from support.blocking import LIMIT_S
from support.engines import free_port, grpc_server, postgres, require_postgres

from mup_megatron.errors import InputError
from mup_megatron.search import ReportFn, StudyRecord, StudySpec, TrialOutcome, find_study, read_study, run_sweep
from mup_megatron.search.patience import Patience
from mup_megatron.search.server import serve
from mup_megatron.search.space import SearchRange, Space
from mup_megatron.search.storage import open_storage

# pytest-xdist runs a thread beside the tests, and Python warns of every fork then.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

N = 8
SPACE = Space({"lr": SearchRange(1e-4, 1e-1, log=True), "scale": SearchRange(-1.0, 1.0, log=False)})


def loss(parameters: Mapping[str, float]) -> float:
    return parameters["lr"] + parameters["scale"] ** 2


class Logged:
    """A trial that writes into a file which it was, and has `meanwhile` called with how many there were before."""

    def __init__(self, folder: Path, meanwhile: Callable[[int], None] = lambda count: None) -> None:
        self.file = folder / "runs"
        self._meanwhile = meanwhile

    def __call__(self, parameters: Mapping[str, float], report: ReportFn) -> TrialOutcome:
        with self.file.open("a") as runs:
            runs.write(f"{next(slot for slot in range(N) if SPACE.sample(3, slot) == parameters)}\n")
        report(1, 9.0)
        self._meanwhile(len(self.runs()))
        return TrialOutcome(loss(parameters), metrics={"tokens": 3})

    def runs(self) -> list[str]:
        return self.file.read_text().split()


KINDS = ["sqlite", "journal", "grpc", "postgresql"]
SERVERS_SLOW = [pytest.param(kind, marks=() if kind in ("sqlite", "journal") else pytest.mark.slow) for kind in KINDS]
"""For what is asked of each storage in a test above as well."""


@pytest.fixture(params=KINDS)
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Each kind's URL."""
    with contextlib.ExitStack() as stack:
        if request.param == "grpc":
            yield stack.enter_context(grpc_server(tmp_path)).url
        elif request.param == "postgresql":
            yield stack.enter_context(postgres()).url
        else:
            yield f"{request.param}:///{tmp_path}/results/study.file"


def spec_in(storage: str, **changes: str) -> StudySpec:
    return StudySpec(changes.get("name", "search"), storage, 3, "random", SPACE, {"layers": 2})


def in_process(work: Callable[[], object]) -> multiprocessing.Process:
    """A fork: gRPC, once used in a process, stands in the way of the forks after it."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def ended(*processes: multiprocessing.Process) -> None:
    for process in processes:
        process.join(LIMIT_S)
        assert process.exitcode == 0


def assert_holds_exactly(record: StudyRecord) -> None:
    """Beside the N there may be one that two calls made at the end, at once: it waits for a larger search."""
    assert (record.size, record.unfinished) == (N, {})
    assert {(trial.state, trial.loss) for trial in record.trials[N:]} <= {("waiting", None)}
    trials = record.trials[:N]
    assert [dict(trial.parameters) for trial in trials] == [SPACE.sample(3, slot) for slot in range(N)]
    assert [trial.loss for trial in trials] == [loss(trial.parameters) for trial in trials]
    assert [trial.metrics for trial in trials] == [{"tokens": 3}] * N


def test_two_commands_on_one_study_end_with_the_same_one_in_every_storage(storage: str, tmp_path: Path) -> None:
    spec = spec_in(storage)
    begin = multiprocessing.get_context("fork").Barrier(2)

    def search() -> None:
        begin.wait(LIMIT_S)
        run_sweep(spec, Logged(tmp_path), N, workers=2)

    ended(in_process(search), in_process(search))
    assert sorted(Logged(tmp_path).runs()) == [str(slot) for slot in range(N)]

    def look() -> None:
        assert find_study(storage, "other") is None
        assert_holds_exactly(read_study(storage, "search"))
        with pytest.raises(InputError, match="no study 'serach' in it, only 'search'"):
            read_study(storage, "serach")
        with pytest.raises(InputError, match=r"made with other settings: seed was 3 and is 4\. Give those"):
            run_sweep(StudySpec("search", storage, 4, "random", SPACE, {"layers": 2}), Logged(tmp_path), N)
        # And goes on, with one that is run nowhere twice.
        assert_holds_exactly(run_sweep(spec, Logged(tmp_path), N).record)

    ended(in_process(look))
    assert len(Logged(tmp_path).runs()) == N


@pytest.mark.parametrize("storage", SERVERS_SLOW, indirect=True)
def test_two_commands_that_make_a_study_of_one_name_with_other_settings_do_not_share_it(
    storage: str, tmp_path: Path
) -> None:
    begin = multiprocessing.get_context("fork").Barrier(2)
    answers = multiprocessing.get_context("fork").SimpleQueue()

    def search(seed: int) -> None:
        begin.wait(LIMIT_S)
        try:
            run_sweep(StudySpec("search", storage, seed, "random", SPACE, {}), lambda p, r: TrialOutcome(1.0), 3)
        except InputError as error:
            answers.put((seed, str(error)))
        else:
            answers.put((seed, None))

    ended(*[in_process(lambda seed=seed: search(seed)) for seed in (3, 4)])
    found = dict([answers.get(), answers.get()])
    refused = [seed for seed, message in found.items() if message is not None]
    assert len(refused) == 1
    assert "made with other settings: seed was" in found[refused[0]]
    (made,) = {3, 4} - set(refused)

    def look() -> None:
        trials = read_study(storage, "search").trials
        assert [dict(trial.parameters) for trial in trials] == [SPACE.sample(made, slot) for slot in range(3)]

    ended(in_process(look))


# Away for a while


def test_a_server_that_is_started_again_knows_the_trials_of_the_one_before(tmp_path: Path) -> None:
    turn = multiprocessing.get_context("fork").Barrier(2)

    with grpc_server(tmp_path) as server:

        def draw() -> None:
            with open_storage(server.url, create=True, patience=Patience(LIMIT_S)) as storage:
                sampler = optuna.samplers.RandomSampler()  # does not read trials by itself
                trial = optuna.create_study(storage=storage.backend, sampler=sampler).ask()
                turn.wait(LIMIT_S)
                turn.wait(LIMIT_S)
                trial.suggest_float("lr", 1e-4, 1e-1, log=True)

        search = in_process(draw)
        turn.wait(LIMIT_S)
        server.kill()
        server.start()
        turn.wait(LIMIT_S)
        ended(search)


def test_a_server_that_is_killed_and_started_again_is_waited_for_and_nothing_is_lost(tmp_path: Path) -> None:
    wanted = tmp_path / "wanted"
    os.mkfifo(wanted)
    asked = os.open(wanted, os.O_RDWR)

    def ask(count: int) -> None:
        for limit in (3, 6):
            # Two that begin at once may both be the fourth, and nobody the third.
            if count >= limit:
                with contextlib.suppress(FileExistsError):
                    (tmp_path / f"asked at {limit}").touch(exist_ok=False)
                    wanted.write_text("!")

    with grpc_server(tmp_path) as server:
        searches = [in_process(lambda: run_sweep(spec_in(server.url), Logged(tmp_path, ask), N)) for _ in range(2)]
        for _ in range(2):
            ready, _, _ = select.select([asked], [], [], LIMIT_S)
            assert ready, "no trial has asked"
            os.read(asked, 1)
            server.kill()
            select.select([], [], [], 0.5)  # enough for somebody to miss it
            server.start()
        ended(*searches)
    os.close(asked)
    assert_holds_exactly(read_study(f"sqlite:///{tmp_path}/served.db", "search"))
    assert sorted(set(Logged(tmp_path).runs())) == [str(slot) for slot in range(N)]


def test_a_database_server_that_crashes_is_waited_for(tmp_path: Path) -> None:
    require_postgres()
    wanted = tmp_path / "wanted"
    os.mkfifo(wanted)

    def ask(count: int) -> None:
        if count == 3:
            wanted.write_text("!")

    with postgres() as server:
        search = in_process(lambda: run_sweep(spec_in(server.url), Logged(tmp_path, ask), N))
        reader = os.open(wanted, os.O_RDONLY)
        server.crash()
        os.close(reader)
        select.select([], [], [], 0.5)
        server.start()
        ended(search)
        assert_holds_exactly(read_study(server.url, "search"))


def test_patience_ends_with_the_storage_named_and_the_same_command_goes_on(tmp_path: Path) -> None:
    with grpc_server(tmp_path) as server:
        spec = spec_in(server.url)

        def search() -> None:
            def end_server(count: int) -> None:
                if count == 2:
                    server.kill_from_elsewhere()

            with pytest.raises(InputError, match=r"grpc://localhost:\d+: the storage failed \(UNAVAILABLE: "):
                run_sweep(spec, Logged(tmp_path, end_server), N, away_s=0.5)

        ended(in_process(search))
        server.start()
        ended(in_process(lambda: run_sweep(spec, Logged(tmp_path), N)))
    assert_holds_exactly(read_study(f"sqlite:///{tmp_path}/served.db", "search"))


class Away(Exception):
    pass


class Flaky:
    """A storage's methods, of which the first calls fail."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.calls = 0

    def __getattr__(self, name: str) -> Callable[[], str]:
        def method() -> str:
            self.calls += 1
            if self.calls <= self.failures:
                raise Away("no route")
            return name

        return method


@pytest.mark.parametrize(("failures", "waits"), [(0, 0), (1, 1), (4, 4)])
def test_waits_grow_and_an_outage_is_said_and_counted_once(failures: int, waits: int) -> None:
    slept: list[float] = []
    said: list[str] = []

    def sleep(seconds: float) -> bool:
        slept.append(seconds)
        return True

    patience, storage = Patience(600.0, sleep, said.append), Flaky(failures)
    patience.have_with(storage, lambda error: str(error) if isinstance(error, Away) else None)  # type: ignore[arg-type]
    assert storage.get_all_studies() == "get_all_studies"
    assert len(slept) == waits
    assert all(0.25 * 2**i <= wait <= 0.5 * 2**i for i, wait in enumerate(slept))
    assert said == ["the storage is away (no route), and is waited for"] * min(failures, 1)
    assert patience.outages == min(failures, 1)


class AwayOnce(optuna.storages.InMemoryStorage):
    """It is away when it is first asked something that Optuna could find out through other methods."""

    been_away = False

    def get_trial_id_from_study_id_trial_number(self, study_id: int, trial_number: int) -> int:
        if not self.been_away:
            self.been_away = True
            raise Away("no route")
        return super().get_trial_id_from_study_id_trial_number(study_id, trial_number)


def test_what_a_storage_need_not_answer_by_itself_is_asked_again_too() -> None:
    storage = AwayOnce()
    Patience(600.0, lambda seconds: True).have_with(
        storage, lambda error: str(error) if isinstance(error, Away) else None
    )
    study = optuna.create_study(storage=storage)
    study.tell(study.ask().number, 1.0)
    assert storage.been_away
    assert study.best_value == 1.0


def test_patience_ends_when_its_process_is_told_to_stop() -> None:
    patience, storage = Patience(600.0, lambda seconds: False), Flaky(99)
    patience.have_with(storage, lambda error: str(error))  # type: ignore[arg-type]
    for calls in (1, 2):  # and for good
        with pytest.raises(optuna.exceptions.StorageInternalError, match="no route"):
            storage.get_all_studies()
        assert storage.calls == calls


# Spellings


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("journal://results/a.log", "write journal:///FILE, with a fourth / before a path from the root"),
        ("journal:///", "write journal:///FILE"),
        ("grpc://", "write grpc://HOST:PORT"),
        ("grpc://host:13000/study", "write grpc://HOST:PORT"),
        ("grpc://host:port", "not a URL"),
        ("redis://localhost", "no driver"),
        ("results/a.log", "not a URL. Write one such as sqlite:///results/study.db, journal:///FILE, grpc://HOST:PORT"),
    ],
)
def test_a_wrong_url_is_refused_with_the_right_one(
    url: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as refusal, open_storage(url, create=True):
        pass
    assert said in str(refusal.value)
    assert len(str(refusal.value)) <= 300
    assert list(tmp_path.iterdir()) == []


SECRET = "s3c4et"


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql+psycopg://me:{SECRET}@localhost:1/studies",
        f"postgresql+psycopg://localhost:1/studies?user=me&password={SECRET}",
        f"postgresql+psycopg://me:{{{SECRET}}}@localhost:1/studies",
        f"postgresql://me:{SECRET}@host:port/studies",
        f"postgresql://me:{SECRET}@[::1/studies",
        f"me:{SECRET}@host",
        f"host=there passwd={SECRET}",
        f"nosuch://me:{SECRET}@host/studies",
        f"grpc://me:{SECRET}@host:1",
        f"journal://me:{SECRET}@host/studies",
        f"mysql+nosuch://host/studies?ssl_key_passphrase={SECRET}&charset=utf8",
    ],
)
def test_passwords_are_never_said(url: str) -> None:
    with pytest.raises(InputError) as refusal:
        read_study(url, "search")
    assert SECRET not in str(refusal.value)
    with pytest.raises(InputError) as refusal:
        serve(url, "localhost", free_port(), say=lambda text: None)
    assert SECRET not in str(refusal.value)


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "sqlite:///file:s?mode=memory&uri=true"])
def test_a_storage_in_memory_is_not_served(url: str) -> None:
    with pytest.raises(InputError, match="in memory, and lost with the server"):
        serve(url, "localhost", free_port(), say=lambda text: None)


def test_no_server_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mup_megatron.search.storage.ANSWERS_S", 0.2)

    def look() -> None:
        with pytest.raises(InputError, match=r"no server answers\. Start one there with `mup-megatron sweep serve`"):
            read_study("grpc://localhost:1", "search")

    ended(in_process(look))


def test_a_server_listens_at_an_address_of_ipv6_too(tmp_path: Path) -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    port, (ours, theirs) = free_port(), multiprocessing.Pipe()
    url = f"grpc://[::1]:{port}"

    def look() -> None:
        with pytest.raises(InputError, match="no study 'search' in it"):
            read_study(url, "search")

    server = in_process(lambda: serve(f"sqlite:///{tmp_path}/served.db", "::1", port, say=theirs.send))
    try:
        assert ours.recv().endswith(f" is served at {url}")
        ended(in_process(look))
    finally:
        server.kill()
        server.join()


# A journal


def test_a_journal_is_optunas(tmp_path: Path) -> None:
    storage = f"journal:///{tmp_path}/a/b.log"
    with pytest.raises(InputError, match=r"b\.log: no such file"):
        read_study(storage, "search")
    assert find_study(storage, "search") is None
    run_sweep(spec_in(storage), Logged(tmp_path), N)
    lines = optuna.storages.journal.JournalFileBackend(f"{tmp_path}/a/b.log")
    study = optuna.load_study(study_name="search", storage=optuna.storages.JournalStorage(lines))
    assert [trial.params for trial in study.trials] == [SPACE.sample(3, slot) for slot in range(N)]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.log"]


def test_what_a_killed_writer_left_unfinished_is_cut_off(tmp_path: Path) -> None:
    storage, file = f"journal:///{tmp_path}/b.log", tmp_path / "b.log"
    run_sweep(spec_in(storage), Logged(tmp_path), N - 1)
    whole = file.read_bytes()
    with file.open("ab") as stream:
        stream.write(b'{"op_code":4,"worker_id":"' + b"x" * 9000)
    run_sweep(spec_in(storage), Logged(tmp_path), N)
    assert file.read_bytes().startswith(whole)
    assert_holds_exactly(read_study(storage, "search"))


@pytest.mark.parametrize(
    "content", [b"no journal\n", b"[1, 2]\n", b'{"op_code": 99}\n{"op', b'{"a": 1}\n', b"x" * 9999]
)
def test_a_file_that_is_no_journal_is_refused_and_kept(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "b.log"
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"b\.log: (not a journal of Optuna's|damaged)"):
        run_sweep(spec_in(f"journal:///{file}"), Logged(tmp_path), N)
    assert file.read_bytes() == content
