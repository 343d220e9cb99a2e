"""Many ranks: `torchrun --nproc-per-node 2 -m moe_lab.connect.distributed configs/lab.yaml --strategy fsdp`.

The micro-batches of a step are dealt out to the ranks, so the update is that of one process, whatever their number; the
gradients are averaged by DDP, or by FSDP2 (`fully_shard`), which also spreads weights and optimizer states. Each rank
has a record: rank 0's is the run's directory and holds the means over all, rank k's lies in its folder rank_k.
"""

import argparse
import hashlib
import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from moe_lab.config import Config, ConfigError, differences, load_config
from moe_lab.data import prepare
from moe_lab.health import Watch, start_sample
from moe_lab.health.findings import counts
from moe_lab.model import LanguageModel, build_model
from moe_lab.optim.groups import groups_of, pass_options
from moe_lab.optim.sharded import local
from moe_lab.train import RunError, Trainer
from moe_lab.train import checkpoint as ckpt
from moe_lab.train.command import exit_code, fit_watched
from moe_lab.train.controls import Controls
from moe_lab.train.device import pick_device
from moe_lab.train.readings import Readings

PLAIN = "state.pt"  # beside the tensors of a checkpoint: what every rank needs of it, readable alone


class Reporting(nn.Module):
    """`model.report` as a forward pass, which is what DDP hooks into."""

    def __init__(self, model: LanguageModel):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, generator: torch.Generator):
        return self.model.report(ids, generator=generator)


class SharedReadings(Readings):
    """Means over the ranks of what each one read."""

    def norm_deviation(self) -> Tensor:
        apart = torch.cat([local(p).detach().float().flatten() - 1 for p in self.norms])
        most = torch.cat([apart.abs(), apart.new_zeros(1)]).max()  # a rank may hold nothing of the norms
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return most

    def gathered(self, numbers: Tensor) -> Tensor:
        dist.all_reduce(numbers)
        return numbers / dist.get_world_size()


class SharedControls(Controls):
    """A stop that one rank is asked for waits until all have heard of it."""

    def __init__(self, acts: dict[str, Callable[[], None]]):
        super().__init__()
        self.acts, self.wanted = acts, False

    def ask(self, action: str, **value: float) -> None:
        if action == "stop":
            self.wanted = True
        else:
            super().ask(action, **value)

    def agree(self, group: dist.ProcessGroup) -> None:
        wanted = torch.tensor(float(self.wanted))
        dist.all_reduce(wanted, dist.ReduceOp.MAX, group=group)
        if wanted:
            super().ask("stop")


class RankTrainer(Trainer):
    """One rank of a training. The process group exists; all ranks are given the same arguments. Raises ConfigError
    where the ranks cannot share out a step's micro-batches or were given different configs."""

    def __init__(self, config: Config, run_dir: Path, strategy: str, resume: bool = False):
        self.rank = dist.get_rank()
        self.n_ranks = dist.get_world_size()
        self.root = Path(run_dir)
        self.group = dist.new_group(backend="gloo")  # for decisions: on the CPU, so that no device waits for them
        agree_on(config, self.n_ranks, self.group)
        if self.rank == 0:
            dataset = prepare(config.data, config.model)
        dist.barrier(group=self.group)  # the others find the tokens made
        if self.rank > 0:
            dataset = prepare(config.data, config.model, progress=False)
        device = pick_device(config.training.device)
        if device.type == "cuda":
            torch.cuda.set_device(device := torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))))
        model = build_model(replace(config.model, vocab_size=dataset.vocab_size), config.training.seed, device)
        sample = start_sample(model)  # of whole tensors
        if strategy == "fsdp":
            shard(model)
        super().__init__(config, self.root if self.rank == 0 else self.root / f"rank_{self.rank}", resume, model)
        self.readings = SharedReadings(self.model)
        self.controls = SharedControls(self.controls.acts)
        self.initial_sample = self.initial_sample or sample
        if strategy == "ddp":
            self.compiled = DistributedDataParallel(Reporting(self.model))

    def micro_batches(self) -> list[Tensor]:
        # each rank drops other units, also after a resume
        place = f"{self.config.training.seed} {self.step} {self.rank}"
        self.dropout_noise.manual_seed(int(hashlib.sha256(place.encode()).hexdigest()[:8], 16))
        return super().micro_batches()[self.rank :: self.n_ranks]  # all ranks draw all, so they stand at the same place

    def clip(self) -> Tensor:
        norm = super().clip()
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def obey_controls(self) -> bool:
        self.controls.agree(self.group)
        return super().obey_controls()

    def save(self, path: Path) -> None:
        """A folder that appears once every rank has written its part; `path` names the step, its ending is not used."""
        self.flush()
        whole = self.root / ckpt.FOLDER / path.stem
        draft = whole.with_suffix(".part")
        with self.off_the_clock():
            model, optimizers = get_state_dict(self.model, self.optimizers)
            dcp.save({"model": model, "optimizers": optimizers}, checkpoint_id=draft)
            if self.rank == 0:
                plain = ckpt.snapshot(self, tensors=False)
                ckpt.save_atomically(plain, draft / PLAIN)
                shutil.rmtree(whole, ignore_errors=True)
                draft.rename(whole)
                old = sorted((self.root / ckpt.FOLDER).glob("step_*[0-9]"))[: -self.config.training.keep_checkpoints]
                for folder in old:
                    shutil.rmtree(folder)
            dist.barrier(group=self.group)
        self.controls.saved = whole.name

    def latest_checkpoint(self) -> tuple[Path, dict[str, Any]]:
        """The newest whole checkpoint of many ranks, and what it holds beside tensors."""
        if not (folders := whole_checkpoints(self.root)):
            has = f"{ckpt.FOLDER}/ holds no checkpoint of many ranks"
            raise RunError(f"{self.root}: nothing to resume from, {has}; start in a new directory")
        self.resumed_from = folders[-1]
        return self.resumed_from, ckpt.load_checkpoint(self.resumed_from / PLAIN)

    def restore(self, stored: dict[str, Any]) -> None:
        model, optimizers = get_state_dict(self.model, self.optimizers)
        parts = {"model": model, "optimizers": optimizers}
        dcp.load(parts, checkpoint_id=self.resumed_from)
        given = [dict(group) for group in groups_of(self.optimizers)]
        states = {"model_state_dict": parts["model"], "optim_state_dict": parts["optimizers"]}
        set_state_dict(self.model, self.optimizers, **states)
        pass_options(given, groups_of(self.optimizers))
        ckpt.restore_place(self, stored)


def whole_checkpoints(run_dir: Path) -> list[Path]:
    """Their folders, the highest step last; one that is still being written is none."""
    folders = [path.parent for path in (run_dir / ckpt.FOLDER).glob(f"*/{PLAIN}") if path.parent.suffix != ".part"]
    return sorted(folders, key=lambda folder: ckpt.load_checkpoint(folder / PLAIN)["step"])


def shard(model: LanguageModel) -> None:
    """Spread each block, and what is left of the model, over the ranks."""
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    for name in ("report", "trunk"):
        register_fsdp_forward_method(model, name)


def agree_on(config: Config, n_ranks: int, group: dist.ProcessGroup) -> None:
    """Raise ConfigError unless all ranks were given this config, and can share out its micro-batches."""
    given: list = [None] * n_ranks
    dist.all_gather_object(given, config, group=group)
    for rank, other in enumerate(given):
        if other != given[0]:
            differing = ", ".join(differences(given[0], other))
            raise ConfigError(f"rank {rank} was given another config than rank 0 ({differing}); start all alike")
    n_micro = config.training.gradient_accumulation_steps
    if n_micro % n_ranks:
        what = f"training.gradient_accumulation_steps={n_micro} cannot be shared out to {n_ranks} ranks"
        raise ConfigError(f"{what}; set it to a multiple (and training.batch_size lower, for the same step)")


def train(args: argparse.Namespace) -> int:
    """Returns 1 if the watch of this rank found an error."""
    config = load_config(args.config, args.overrides)
    try:
        dist.init_process_group("nccl" if pick_device(config.training.device).type == "cuda" else "gloo")
    except (ValueError, RuntimeError) as error:  # no launcher, or a port that is taken
        how = "torchrun --standalone --nproc-per-node 2 -m moe_lab.connect.distributed …"
        reason = " ".join(str(error).split())[:160]
        raise ConfigError(f"the ranks cannot meet ({reason}); start with: {how}") from None
    rank = dist.get_rank()
    try:
        trainer = RankTrainer(config, args.run_dir, args.strategy, args.resume)
        with trainer.opened():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # after `fit`, which obeys it: what ends says why
            status, findings = fit_watched(trainer, Watch, speaks=rank == 0)
        if rank == 0:
            found = counts(finding.severity for finding in findings)
            where = f"{trainer.step} steps on {trainer.n_ranks} ranks in {trainer.root}"
            print(f"{status}: {where}; this rank's watch: {found}")
        return int(any(finding.severity == "error" for finding in findings))
    except (RuntimeError, dcp.CheckpointException) as error:
        words = ("gloo", "connection", "nccl", "peer", "socket")  # Gloo has no class of its own for a rank that is gone
        of_ranks = isinstance(error, dist.DistError) or any(word in str(error).lower() for word in words)
        if isinstance(error, RunError) or not of_ranks:
            raise
        last = [folder.name for folder in whole_checkpoints(args.run_dir)][-1:] or ["none"]
        lost = f"rank {rank}: another rank is gone; last whole checkpoint: {last[0]}"
        raise RunError(f"{lost}; go on with --resume") from error
    finally:
        dist.destroy_process_group()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="torchrun … -m moe_lab.connect.distributed")
    parser.add_argument("config", help="a YAML file, such as configs/lab.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument(
        "--strategy", choices=("ddp", "fsdp"), default="fsdp", help="DDP copies the model, FSDP2 spreads it"
    )
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--resume", action="store_true", help="from the last checkpoint, with any number of ranks")
    return exit_code(train, parser.parse_intermixed_args(argv))


def leave(code: int) -> NoReturn:
    """Ends this rank's process without taking the interpreter down first: DTensor's caches keep gloo's threads past
    `destroy_process_group`, and one that lets go of a tensor at the interpreter's end takes the rank down with SIGABRT.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main())
