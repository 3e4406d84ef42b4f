"""The one training loop: prepare or resume a run, take steps, evaluate, save, and leave a summary.

A run is resumed bitwise: model, optimiser, schedule, loader position, random generators and counters all come back from
the checkpoint, and the loader's batches are a function of (seed, step). SIGINT, SIGTERM or SIGHUP finishes the step,
saves, and says how to go on. A loss or gradient that is not finite never reaches a parameter.
"""

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path

import torch

from moe.analysis.replay import Replay, check_space
from moe.config.balance import rows_vary
from moe.config.model import layer_moe, moe_layers
from moe.config.parallel import Layout, layout
from moe.config.parse import to_dict
from moe.config.run import Config
from moe.config.train import warmup_steps
from moe.data.answer_loader import PairLoader, PromptLoader, rows_of
from moe.data.loader import Loader, validation_windows
from moe.data.owner import remove_leftovers
from moe.data.prepare import prepare
from moe.data.shards import Dataset
from moe.errors import BadInput
from moe.eval.evaluate import Evaluation, evaluate
from moe.model import cost, dispatch
from moe.model.adapt import adapt
from moe.model.transformer import Transformer
from moe.parallel import launch
from moe.parallel.collectives import this_rank
from moe.parallel.mesh import build_meshes
from moe.run import checkpoint, jsonl, machine, sharded, terminal
from moe.run.folder import (
    check_same,
    check_tokenizer,
    check_unedited,
    command_to_resume,
    create_folder,
    default_folder,
    mend_folder,
    read_config,
    write_config,
)
from moe.run.load import find_source
from moe.run.lock import Lock
from moe.run.machine import autocast
from moe.run.precision import choose_precision
from moe.run.summary import MetricsLine, Summary, line_from_json, read_metrics, read_summary, write_summary
from moe.train import beforehand
from moe.train.distill import load_teacher
from moe.train.non_finite import check_validation
from moe.train.objective import prepare_objective
from moe.train.optimizer import build_optimizer
from moe.train.recorder import Recorder
from moe.train.refusals import naming_checkpoint
from moe.train.signals import Stop, catch_signals
from moe.train.state import State, go_on_from, restore, save_checkpoint, seed_everything, take_weights
from moe.train.step import take_step


def train(cfg: Config, say: Callable[[str], None] = terminal.say) -> Summary:
    """Train, resume, or (if it is finished) only read the run of `cfg`. Returns its summary, as in summary.json.

    Raises `BadInput` for anything a person can correct; `SystemExit` with 128 + the signal's number after SIGINT,
    SIGTERM or SIGHUP, once the step is saved."""
    cfg = copy.deepcopy(cfg)
    code = machine.git_state()  # now: by the end the files may be others than those imported

    # The other ranks, if there are any. Rank 0 speaks and writes for all.
    launch.join(cfg.train.device, cfg.parallel.timeout)
    ranks = this_rank()
    say = say if ranks.rank == 0 else silent
    sizes = layout(cfg.parallel, ranks.n)

    # What is asked for and cannot be had is refused before anything costs time.
    beforehand.check(cfg)
    folder = Path(cfg.run) if cfg.run else default_folder(cfg)
    started = folder.exists()
    if ranks.n > 1:
        beforehand.check_ranks(
            cfg, sizes, {"run": str(folder), f"the folder {folder}": "there" if started else "none"}, code
        )
    if started:
        recorded = read_config(folder, cfg.trust or cfg.router.name)
        check_unedited(folder, recorded)
    device = machine.choose_device(launch.device_of(cfg.train.device))
    threads = machine.set_threads(cfg.train)
    machine.keep_freed_memory()
    backend, why = dispatch.choose(cfg.dispatch, device)
    if cfg.dispatch == "auto" and cfg.model.moe:
        say(f"dispatch: {backend}, because {why}")
    cfg.dispatch = backend

    # The text, and with it the last settings that were open; a run that is there must have had the same.
    dataset = launch.first_then_others(lambda: prepare(cfg.data, cfg.tokenizer, say))
    if started and cfg.train.precision == "auto":
        cfg.train.precision = recorded.train.precision  # measured when it began
    if started and cfg.optim.warmup < 0:
        cfg.optim.warmup = recorded.optim.warmup  # derived when it began, or what was the default then
    cfg = resolve(cfg, folder, dataset, device, say)
    changes: list[str] = []
    if started and Path(recorded.source).is_relative_to(cfg.source or recorded.source):
        cfg.source = recorded.source  # as it was found then
    elif cfg.source:
        cfg.source = str(find_source(cfg.source))
    if started:
        changes = check_same(recorded, cfg)
        check_tokenizer(folder, dataset.tokenizer)
        if (folder / "summary.json").exists():
            summary = read_summary(folder)
            say(f"run: {folder} is finished")
            return summary

    # Everything else that may be refused, and only then the folder.
    loader = loader_of(cfg, dataset)
    if ranks.n > 1:
        launch.check_alike({"data": dataset.split("train").dataset, "tokenizer": dataset.tokenizer.fingerprint})
        loader.share(ranks.rank, ranks.n, cfg.train.accumulate)
    validation_windows(dataset.split("val"), cfg.model.context, cfg.train.eval_tokens, cfg.data.whole())
    teacher = load_teacher(cfg, dataset.tokenizer.fingerprint, device)
    replay = Replay(cfg) if cfg.balance.recorded and cfg.model.moe else None
    if cfg.log.experts:
        check_space(folder, cfg)

    document_end = cfg.data.document_end(dataset.tokenizer.eot)
    companions = prepare_objective(cfg, dataset.tokenizer, document_end, device)
    if not started:
        beforehand.rehearse(cfg, document_end, device)

    # The state of the beginning, which may be another run's.
    machine.reset_peak_memory(device)
    seed_everything(cfg.seed)
    model = Transformer(cfg.model, cfg.router, cfg.balance, document_end, reward=cfg.objective.name == "reward")
    model.initialize(cfg.init_seed()).to(device)
    adapt(model, cfg.tune, cfg.init_seed())
    anew = cfg.source and checkpoint.newest_meta(folder / "checkpoints") is None
    snapshot = take_weights(model, loader, cfg, dataset.tokenizer.fingerprint, say) if anew else None
    if ranks.n > 1:
        from moe.train.parallelize import parallelize  # here, because a process of its own need not import FSDP

        parallelize(model, build_meshes(sizes, device.type), cfg.parallel, cfg.train.compile)
    state = State(model, build_optimizer(model, cfg.optim), loader, teacher, replay, companions)
    if snapshot is not None:
        go_on_from(state, snapshot, cfg, say)

    # From here on the folder is this run's alone.
    if not started and ranks.rank == 0:
        create_folder(folder, cfg, dataset.tokenizer)
    with Lock(folder) if ranks.rank == 0 else nullcontext() as lock:
        launch.together()
        beforehand.check_seen(folder)
        if (folder / "summary.json").exists():  # another process was there first, and is done
            say(f"run: {folder} is finished")
            return read_summary(folder)
        if lock:
            for left in (folder.parent, folder, folder / "checkpoints"):
                remove_leftovers(left)
            if changes:
                write_config(folder, cfg)
        launch.together()
        for change in changes:
            say(f"run: {change}")
        restore(state, folder, threads, say)
        if cfg.train.compile and ranks.n == 1:
            model.compile()

        size = cost.size(cfg.model, cfg.router)
        say(
            f"run: {folder}  {size.total:,} parameters, {size.active:,} active  {cfg.train.precision} on {device}, "
            f"{threads} threads, dispatch={cfg.dispatch}{mesh_words(sizes)}  steps {state.step} to {cfg.train.steps}"
        )
        with catch_signals() as stop, naming_checkpoint(cfg, folder / "checkpoints"):
            final = run_steps(state, cfg, folder, lock, dataset, stop)
        if final is None:
            say(
                f"Stopped after step {state.step} of {cfg.train.steps}, saved in {folder}. "
                f"Go on with: {command_to_resume(folder, cfg)}"
            )
            raise SystemExit(128 + stop.number)
        if lock:
            lock.check()
            write_summary(folder, summarize(state, cfg, dataset, final, device, threads, code))
        launch.together()
    summary = read_summary(folder)
    say(f"run: {folder} is finished  val loss {summary.val.loss:.4f}  bits per byte {summary.val.bpb:.4f}")
    return summary


def loader_of(cfg: Config, dataset: Dataset) -> Loader:
    """The batches of a run: windows of text, pairs of answers, or prompts. Raises `BadInput` where there is none, and
    for a row that the model cannot read whole."""
    split, context, seed = dataset.split("train"), cfg.model.context, cfg.data_seed()
    if cfg.objective.name == "lm":
        return Loader(split, cfg.train.batch_size, context, seed, cfg.data.workers, cfg.data.whole())
    rows = rows_of(cfg.data, split.name)
    if cfg.objective.name == "grpo":
        n_prompts = cfg.train.batch_size // cfg.objective.group
        return PromptLoader(split, rows, dataset.tokenizer, n_prompts, context, seed, cfg.objective.max_new)
    return PairLoader(split, rows, dataset.tokenizer, cfg.train.batch_size, context, seed)


def resolve(cfg: Config, folder: Path, dataset: Dataset, device: torch.device, say: Callable[[str], None]) -> Config:
    """The config with every "auto" and "derive it" replaced, and said what a measurement decided. Raises `BadInput` for
    a vocabulary that does not fit."""
    vocab_size = dataset.tokenizer.vocab_size
    if cfg.model.vocab_size and cfg.model.vocab_size < vocab_size:
        raise BadInput(
            f"model.vocab_size={cfg.model.vocab_size} is smaller than the {vocab_size} of tokenizer.name="
            f"{cfg.tokenizer.name}: leave it 0 to take the tokenizer's, or choose a smaller tokenizer."
        )
    cfg.run = str(folder)
    cfg.model.vocab_size = cfg.model.vocab_size or vocab_size
    precision, why = launch.first_then_tell(lambda: choose_precision(cfg, device))  # each might measure another
    if cfg.train.precision == "auto":
        say(f"precision: {precision}, because {why}")
    cfg.train.precision = precision
    cfg.train.device = str(device)
    cfg.optim.warmup = warmup_steps(cfg.optim, cfg.train.steps)
    return cfg


def run_steps(
    state: State, cfg: Config, folder: Path, lock: Lock | None, dataset: Dataset, stop: Stop
) -> Evaluation | None:
    """Step until the end. Returns the final evaluation, or None when a signal ended the run early (it is saved). Raises
    `BadInput` when the run's folder is another process' or gone, and writes nothing there. Of several ranks the one
    with the `lock` writes."""
    final = None
    unevaluated = take_back_unevaluated(state, cfg, folder / "metrics.jsonl") if lock else None
    unevaluated = launch.from_first(unevaluated)
    with (
        Recorder(cfg, lock, state.step) if lock else nullcontext() as recorder,
        sharded.Saver() if cfg.checkpoint.aside else nullcontext() as state.saver,
    ):
        if unevaluated:
            final = validate(state, cfg, dataset, stop)
        if unevaluated and recorder:
            recorder.record(with_validation(unevaluated, final))
            saved = checkpoint.latest(folder / "checkpoints", recorder.watch.say)
            if final and saved and saved.name == checkpoint.name_of(state.step):
                checkpoint.add_score(saved, final.val.loss, keep=cfg.checkpoint.keep, warn=recorder.watch.say)
        with closing(state.loader.iterate(state.step)) as batches:
            for batch in batches if state.step < cfg.train.steps and not stop.number else ():
                line, gradients = take_step(state, batch, cfg, folder / "checkpoints")
                if evaluates(state.step, cfg):
                    final = validate(state, cfg, dataset, stop)
                    line = with_validation(line, final)
                if recorder:
                    recorder.record(line, gradients.routing)
                at_end = state.step == cfg.train.steps or stop.agreed() > 0
                if at_end or (cfg.checkpoint.every and state.step % cfg.checkpoint.every == 0):
                    save(state, cfg, folder, dataset, line, recorder, stop)
                    # `at_end` from before the save: a signal since then must not end a step that is not saved.
                    if at_end or stop.agreed():
                        break
        if stop.agreed() and state.step == 0:
            save(state, cfg, folder, dataset, None, recorder, stop)
        if stop.agreed():
            return None
        final = final or validate(state, cfg, dataset, stop)  # a run killed between its last checkpoint and its summary
        keep_whole(cfg, folder, dataset, recorder)
        return final


def validate(state: State, cfg: Config, dataset: Dataset, stop: Stop) -> Evaluation | None:
    """Evaluate this moment's model; None when a signal cuts it short. Raises `BadInput` where a loss is not finite."""
    evaluation = evaluate(
        state.model,
        dataset,
        n_tokens=cfg.train.eval_tokens,
        batch_size=cfg.train.batch_size // cfg.train.accumulate,
        backend=cfg.dispatch,
        autocast=partial(autocast, cfg),
        whole=cfg.data.whole(),
        stop=lambda: stop.agreed() > 0,
    )
    if evaluation:
        check_validation(state, evaluation, cfg, dataset, Path(cfg.run) / "checkpoints")
    return evaluation


def with_validation(line: MetricsLine, evaluation: Evaluation | None) -> MetricsLine:
    """The line with what an evaluation found, as far as there was one."""
    return dataclasses.replace(line, val=evaluation.val) if evaluation else line


def save(
    state: State,
    cfg: Config,
    folder: Path,
    dataset: Dataset,
    line: MetricsLine | None,
    recorder: Recorder | None,
    stop: Stop,
) -> None:
    """A checkpoint, which a person who asked for an end is told of."""
    score = line.val.loss if line and line.val else None
    keep_whole(cfg, folder, dataset, recorder)
    say = recorder.watch.say if recorder else silent
    path = save_checkpoint(state, cfg, folder / "checkpoints", dataset, score, say)
    if stop.number:
        say(f"checkpoint: {path}")


def keep_whole(cfg: Config, folder: Path, dataset: Dataset, recorder: Recorder | None) -> None:
    """Make again what was deleted of the run's files. Raises `BadInput` where it is not to be mended."""
    if recorder:
        recorder.keep_files()
        mend_folder(folder, cfg, dataset.tokenizer)


def silent(line: str) -> None:
    """What ranks other than the first say."""


def mesh_words(sizes: Layout) -> str:
    """The meshes, where there is more than one rank."""
    if sizes.ranks() == 1:
        return ""
    return f"  {sizes.replicate} x {sizes.shard} ranks, ep={sizes.ep}"


def evaluates(step: int, cfg: Config) -> bool:
    """Whether the metrics line of `step` has a validation: the first, the last, and every `train.eval_every`."""
    return step in (0, cfg.train.steps) or bool(cfg.train.eval_every and step % cfg.train.eval_every == 0)


def take_back_unevaluated(state: State, cfg: Config, path: Path) -> MetricsLine | None:
    """The metrics line of this moment if it should have a validation and has none (the run begins, or a signal cut the
    evaluation short), taken out of the file at `path`; else None."""
    written = jsonl.read_lines(path)
    if written and written[-1]["step"] == state.step:
        line = line_from_json(written[-1], str(path))
    else:
        line = MetricsLine(state.step, state.seconds)
    if line.val or not evaluates(state.step, cfg):
        return None
    jsonl.keep_until(path, state.step - 1)
    return line


def measured_rows(lines: list[MetricsLine]) -> float | None:
    """`LayerMetrics.rows`, the mean over the MoE layers and the steps of these lines; None where nothing says it."""
    rows = [layer.rows for line in lines for layer in line.layers or [] if layer.rows is not None]
    return sum(rows) / len(rows) if rows else None


def places_read(lines: list[MetricsLine]) -> int:
    """How many tokens' places the steps of these lines had, where rows are as long as a batch's longest."""
    pairs = itertools.pairwise(lines)
    return sum(round((line.tokens_per_s or 0.0) * (line.seconds - before.seconds)) for before, line in pairs)


def summarize(
    state: State,
    cfg: Config,
    dataset: Dataset,
    final: Evaluation,
    device: torch.device,
    threads: int,
    code: machine.GitState,
) -> Summary:
    """The numbers of a finished run, and what they came from."""
    lines = read_metrics(Path(cfg.run))
    tokens = cfg.train.steps * cfg.train.batch_size * cfg.model.context
    if cfg.objective.name != "lm":
        tokens = places_read(lines)
    # What experts computed counts as measured where the settings do not say it.
    rows = measured_rows(lines)
    layers = [layer_moe(cfg.model, layer) for layer in moe_layers(cfg.model)]
    vary = any(rows_vary(moe, cfg.router, cfg.balance) for moe in layers)
    return Summary(
        name=Path(cfg.run).name,
        seed=cfg.seed,
        seed_init=cfg.init_seed(),
        seed_data=cfg.data_seed(),
        model=to_dict(cfg.model),
        params=cost.size(cfg.model, cfg.router),
        flops=cost.flops(cfg.model, cfg.router, rows=rows if vary else None),
        rows=rows,
        steps=state.step,
        tokens=tokens,
        seconds=state.seconds,
        tokens_per_s=tokens / state.seconds if state.seconds else math.nan,  # a clock may stand still
        peak_memory_bytes=machine.peak_memory(device),
        val=final.val,
        val_windows=final.windows,
        load=final.load,
        dataset=dataset.split("train").dataset,
        tokenizer=dataset.tokenizer.fingerprint,
        precision=cfg.train.precision,
        dispatch=cfg.dispatch,
        device=machine.device_name(device),
        threads=threads,
        versions=machine.versions(),
        skipped=state.skipped,
        commit=code.commit,
        dirty=code.dirty,
    )
