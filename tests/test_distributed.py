"""Many ranks, as gloo runs them on one machine: the same updates as one process, checkpoints, and how a job ends."""

import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from moe_lab import Trainer, load_config
from moe_lab.connect.distributed import leave, main
from moe_lab.optim import Muon
from moe_lab.optim.sharded import is_sharded
from moe_lab.train.record import read_record

ROOT = Path(__file__).parents[1]
# Every mechanism, three experts (of which two ranks hold two and one, four ranks none at all for one of them), no dropout:
# its units follow from the rank
SETTINGS = {
    "model": {"dropout": 0, "n_experts": 3},
    "training": {"gradient_accumulation_steps": 4, "batch_size": 2, "steps": 20, "max_lr": 0.005, "warmup_steps": 0}
    | {"log_interval": 1, "eval_interval": 20, "save_interval": 10, "device": "cpu"},
    "data": {"max_bytes": 100_000},  # every rank scores the whole validation text, twice
}
OVERRIDES = [f"{section}.{key}={value}" for section, values in SETTINGS.items() for key, value in values.items()]
GIVEN = [str(ROOT / "configs/smoke.yaml"), *OVERRIDES]
MODULE = ["-m", "moe_lab.connect.distributed", *GIVEN]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
NEAR = 3e-4  # nats: other orders of the same sums, through a discrete choice now and then
# A process imports for seconds what a rank of these needs for one: ranks without a launcher are forks of one that has
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["moe_lab.connect.distributed"])


def launch(n_ranks: int, run_dir: Path, *more: str) -> subprocess.Popen:
    """As a user does."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n_ranks)]
    command += [*MODULE, "--run-dir", str(run_dir), *more]
    return subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def one_rank(arguments: list[str], environment: dict[str, str], said: Path) -> None:
    for stream in (sys.stdout, sys.stderr):
        os.dup2(os.open(said, os.O_WRONLY | os.O_APPEND), stream.fileno())
    os.environ.update(environment)
    torch.set_num_threads(1)
    leave(main(arguments))


class Ranks:
    """Processes that are told of each other as a launcher tells them, each with its arguments."""

    def __init__(self, folder: Path, *arguments: list[str], **meeting: str):
        self.processes, self.said = [], []
        for rank, given in enumerate(arguments):
            own = meeting and meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(arguments))}
            self.said.append(folder / f"said_{len(list(folder.glob('said_*')))}.txt")
            self.said[-1].touch()
            self.processes.append(FORKS.Process(target=one_rank, args=(given, own, self.said[-1])))
            self.processes[-1].start()

    def end(self) -> tuple[list[int], list[str]]:
        """Their exit codes, and what each one said."""
        for process in self.processes:
            process.join(240)
            process.kill()
            process.join()
        return [process.exitcode for process in self.processes], [path.read_text() for path in self.said]


def meeting() -> dict[str, str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}


def start(n_ranks: int, run_dir: Path, *more: str) -> Ranks:
    arguments = [*GIVEN, "--run-dir", str(run_dir), *more]
    return Ranks(run_dir.parent, *[arguments] * n_ranks, **meeting())


def train(n_ranks: int, run_dir: Path, *more: str) -> Path:
    codes, said = start(n_ranks, run_dir, *more).end()
    assert set(codes) == {0}, said[0][-3000:]
    assert f"finished: 20 steps on {n_ranks} ranks" in said[0]
    return run_dir


def losses(run_dir: Path) -> list[float]:
    return [row["loss"] for row in read_record(run_dir) if "loss" in row]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "run"
    Trainer(load_config(ROOT / "configs/smoke.yaml", OVERRIDES), folder).fit()
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("two") / "run"
    job = launch(2, run_dir, "--strategy", "fsdp")
    out, err = job.communicate(timeout=240)
    assert job.returncode == 0, err[-3000:]
    assert "finished: 20 steps on 2 ranks" in out
    return run_dir


def test_two_sharded_ranks_make_the_updates_of_one_process(alone: Path, two: Path) -> None:
    for one, ours in zip(read_record(alone), read_record(two), strict=True):
        if "event" in one:
            assert ours["validation_loss"] == pytest.approx(one["validation_loss"], abs=NEAR)
            continue
        assert ours["loss"] == pytest.approx(one["loss"], abs=NEAR) and ours["tokens"] == one["tokens"]
        assert ours["losses"] == pytest.approx(one["losses"], abs=NEAR) and ours["lr"] == one["lr"]
        assert ours["grad_norm"] == pytest.approx(one["grad_norm"], rel=0.02)
        assert ours["norm_deviation"] == pytest.approx(one["norm_deviation"], rel=0.02, abs=1e-7)
        for load, expected in zip(ours["expert_load"], one["expert_load"], strict=True):
            assert load == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize(("n_ranks", "strategy"), [(2, "ddp"), (4, "fsdp")])
def test_so_do_copies_and_four_ranks(alone: Path, tmp_path: Path, n_ranks: int, strategy: str) -> None:
    run = train(n_ranks, tmp_path / "run", "--strategy", strategy)
    assert losses(run) == pytest.approx(losses(alone), abs=NEAR)
    assert len(losses(run)) == 20


def test_accelerate_launches_the_same_module(alone: Path, tmp_path: Path) -> None:
    """With its `--use_fsdp`, since it asks MPI for ranks on a CPU."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--use_fsdp", "--num_processes", "2"]
    launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    job = [*launcher, *MODULE, "--run-dir", str(tmp_path / "run")]
    done = subprocess.run(job, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "finished: 20 steps on 2 ranks" in done.stdout
    assert losses(tmp_path / "run") == pytest.approx(losses(alone), abs=NEAR)


@pytest.mark.parametrize("n_ranks", [1, 4])
def test_a_checkpoint_of_two_ranks_goes_on_with_one_and_with_four(two: Path, tmp_path: Path, n_ranks: int) -> None:
    run = shutil.copytree(two, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "step_000020")
    train(n_ranks, run, "--strategy", "fsdp", "--resume")
    assert losses(run) == pytest.approx(losses(two), abs=NEAR) and len(losses(run)) == 20


def whole_checkpoint(run_dir: Path, runs: Callable[[], bool]) -> None:
    """Wait for the first."""
    deadline = time.monotonic() + 200
    while not list((run_dir / "checkpoints").glob("step_*[0-9]/state.pt")):
        assert time.monotonic() < deadline and runs()
        time.sleep(0.2)


def tells_and_goes_on(run_dir: Path, said: str) -> None:
    """One line says what is lost and what is left; what is left is enough."""
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: rank 0: another rank is gone; last whole checkpoint: step_")
    step = torch.load(max((run_dir / "checkpoints").glob("step_*[0-9]")) / "state.pt", weights_only=True)["step"]
    _, resumed = start(2, run_dir, "--resume", f"training.steps={step + 2}").end()
    assert f"finished: {step + 2} steps on 2 ranks" in resumed[0], resumed[0][-3000:]


def test_a_killed_rank_ends_the_job_and_a_whole_checkpoint_is_left(tmp_path: Path) -> None:
    job = launch(2, tmp_path / "run", "training.steps=100000", "training.save_interval=5")
    try:
        whole_checkpoint(tmp_path / "run", lambda: job.poll() is None)
        children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
        os.kill(int(children[1]), signal.SIGKILL)
        _, err = job.communicate(timeout=120)
    finally:
        job.kill()
    assert job.returncode != 0
    tells_and_goes_on(tmp_path / "run", err)


def test_so_it_is_where_the_rank_is_killed_within_a_save(tmp_path: Path) -> None:
    """As likely as not."""
    job = start(2, tmp_path / "run", "training.steps=100000", "training.save_interval=1")
    try:
        whole_checkpoint(tmp_path / "run", lambda: all(process.is_alive() for process in job.processes))
    finally:
        job.processes[1].kill()
    codes, said = job.end()
    assert codes == [2, -signal.SIGKILL]
    tells_and_goes_on(tmp_path / "run", said[0])


def test_what_cannot_be_shared_out_is_refused_in_one_line(tmp_path: Path) -> None:
    codes, said = start(2, tmp_path / "run", "training.gradient_accumulation_steps=3").end()
    lines = {line for text in said for line in text.splitlines() if line.startswith("error: ")}
    assert codes == [2, 2] and len(lines) == 1
    assert "training.gradient_accumulation_steps=3 cannot be shared out to 2 ranks; set it to a multiple" in lines.pop()
    assert not (tmp_path / "run").exists()


def test_a_rank_with_another_config_is_refused_by_all(tmp_path: Path) -> None:
    given = [[*GIVEN, f"training.seed={rank}", "--run-dir", str(tmp_path / "run")] for rank in range(2)]
    codes, said = Ranks(tmp_path, *given, **meeting()).end()
    assert codes == [2, 2]
    for text in said:
        line = text.strip().splitlines()[-1]
        assert line.startswith("error: rank 1 was given another config than rank 0 (training.seed: 0 → 1); start")


def test_without_a_launcher_or_with_a_taken_port_one_line_says_so(tmp_path: Path) -> None:
    given = [*GIVEN, "--run-dir", str(tmp_path / "run")]
    (code,), (said,) = Ranks(tmp_path, given).end()
    assert code == 2 and said.strip().splitlines()[-1].startswith("error: the ranks cannot meet (")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        (code,), (said,) = Ranks(tmp_path, given, **meeting() | {"MASTER_PORT": str(taken.getsockname()[1])}).end()
    line = said.strip().splitlines()[-1]
    assert code == 2 and "address already in use" in line.lower() and "torchrun --standalone" in line


# ---- Muon alone ------------------------------------------------------------------------------------------------------

SHAPES = [(8, 6), (3, 5), (5, 12), (1, 4), (3, 6, 4), (5, 4, 6)]


def updated(shard: bool) -> list[torch.Tensor]:
    """Weights after four updates of Muon; `shard`: as DTensors of the process group there is."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator) for shape in SHAPES]
    mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if shard else None

    def placed(t: torch.Tensor) -> torch.Tensor:
        return distribute_tensor(t, mesh, [Shard(0)]) if shard else t

    weights = [torch.nn.Parameter(placed(value)) for value in values]
    optimizer = Muon(weights, lr=0.02, weight_decay=0.1)
    for _ in range(4):
        for weight, value in zip(weights, values, strict=True):
            grad = torch.randn(value.shape, generator=generator)
            if grad.ndim == 3:
                grad[1] = 0  # an expert without a token is left alone, on whichever rank it is
            weight.grad = placed(grad)
        optimizer.step()
    return [w.full_tensor() if shard else w.detach() for w in weights]


def rank(number: int, n_ranks: int, store: str, result: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, n_ranks), rank=number, world_size=n_ranks)
    whole = updated(shard=True)
    if number == 0:
        torch.save(whole, result)
    mesh = init_device_mesh("cpu", (n_ranks,))
    assert not is_sharded(distribute_tensor(torch.ones(4, 4), mesh, [Replicate()]))
    try:
        is_sharded(distribute_tensor(torch.ones(4, 4), mesh, [Shard(1)]))
    except ValueError as error:
        assert "cut along their first dimension" in str(error)
    else:
        raise AssertionError("columns on several ranks were taken")
    dist.destroy_process_group()
    leave(0)


@pytest.mark.parametrize("n_ranks", [2, 3])
def test_muon_on_spread_tensors_is_muon_on_whole_ones(tmp_path: Path, n_ranks: int) -> None:
    arguments = (n_ranks, str(tmp_path / "store"), str(tmp_path / "result"))
    torch.multiprocessing.start_processes(rank, arguments, n_ranks, start_method="forkserver")
    for ours, expected in zip(torch.load(tmp_path / "result"), updated(shard=False), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=2e-5)  # the same products, in other batches


def test_a_record_tells_what_a_rank_saw(two: Path) -> None:
    assert {path.name for path in two.iterdir()} >= {"record.jsonl", "config.yaml", "summary.json", "rank_1"}
    assert json.loads((two / "summary.json").read_text())["status"] == "finished"
