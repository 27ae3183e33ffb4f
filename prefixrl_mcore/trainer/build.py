"""Building a session: what one rank of a training run needs, at step 0."""

import itertools
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

import torch

from prefixrl_mcore.accounting.flops import FlopsMeter
from prefixrl_mcore.accounting.parameters import count_parameters
from prefixrl_mcore.checkpoint.convert.hf_folder import digest_of_weights
from prefixrl_mcore.checkpoint.retention import Retention
from prefixrl_mcore.checkpoint.saver import CheckpointSaver
from prefixrl_mcore.config.base import ConfigError
from prefixrl_mcore.config.rollout import RolloutConfig
from prefixrl_mcore.config.run import CheckpointConfig, RunConfig
from prefixrl_mcore.config.server_gpus import check_server_gpus
from prefixrl_mcore.config.sft import check_trace_lengths
from prefixrl_mcore.data.prefixes import read_prefixes
from prefixrl_mcore.data.problem_sets import read_evaluation_sets
from prefixrl_mcore.data.prompts import PromptRenderer
from prefixrl_mcore.data.source import MixtureSource, original_problems, union
from prefixrl_mcore.data.traces import TraceStore
from prefixrl_mcore.eval.setup import build_evaluator, read_traces
from prefixrl_mcore.observability.phases import Phases
from prefixrl_mcore.observability.progress import Progress
from prefixrl_mcore.observability.run_folder import RunFolder
from prefixrl_mcore.policy.serving import CollectiveServices
from prefixrl_mcore.policy.topology import Topology, num_local_ranks, run_on_first
from prefixrl_mcore.records import PrefixedProblem, Problem, Trace
from prefixrl_mcore.rollout.sglang.environment import has_interpreter
from prefixrl_mcore.trainer.agreement import GapAlarm
from prefixrl_mcore.trainer.generation import Generator
from prefixrl_mcore.trainer.memory import give_back_cached_memory
from prefixrl_mcore.trainer.out_of_memory import explained
from prefixrl_mcore.trainer.profiling import StepProfiler
from prefixrl_mcore.trainer.rollout_supply import RolloutSupply
from prefixrl_mcore.trainer.run_policy import build_policy
from prefixrl_mcore.trainer.run_saves import RunSaves
from prefixrl_mcore.trainer.session import EXPORT, Session
from prefixrl_mcore.trainer.signals import StopSignal
from prefixrl_mcore.trainer.step_metrics import read_hardware


def build_session(
    config: RunConfig,
    folder: RunFolder,
    topology: Topology,
    stack: ExitStack,
    *,
    phases: Phases,
    stop: StopSignal,
    predicted_bytes: float | None = None,
) -> Session:
    """Build this rank's session at step 0; rank 0 also starts the engine and the verifier.

    ``phases`` become the policy's; ``stop`` interrupts what the engine samples.

    Raises:
        ConfigError: on every rank and before anything is loaded, if trainer and servers need more
            GPUs than rank 0's machine has, or there are fewer servers than ``min_servers``; before
            weights are read and servers started, if the supervised phase cannot be.
    """
    _check_servers(config.rollout, topology)
    renderer = PromptRenderer(config.model.path, config.data.prompt)
    sets = read_evaluation_sets(config)
    originals = original_problems(renderer.render(problem) for problem in sets["train"])
    if config.method == "sft_then_rl":
        run_on_first(lambda: _check_supervised_phase(config, read_sft_traces(config, renderer)))
    prefixed: list[PrefixedProblem] = []
    if config.method == "prefixrl":
        prefixed = _read_prefixed(config, renderer, sets["train"])
    policy = build_policy(config)
    give_back_cached_memory()  # servers on the same GPUs take a share of what is free
    profiler = stack.enter_context(StepProfiler(config.profile, folder.profile, topology))
    policy.phases = phases
    phases.annotate = profiler.annotate
    saver = CheckpointSaver(
        folder.checkpoints,
        _retention(config.checkpoint),
        in_background=config.checkpoint.in_background,
    )
    evaluator = None
    if topology.is_first:
        evaluator = stack.enter_context(
            build_evaluator(
                config,
                renderer=renderer,
                model_folder=config.model.path,
                temperature=config.evaluation.temperature,
                logs_folder=folder.logs / "train",
                problems=itertools.chain.from_iterable(sets.values()),
                is_synced=True,
                is_interrupted=lambda: stop.interrupts_sampling(saver.seconds_to_save),
                num_trainer_ranks=num_local_ranks(),
            )
        )
    source = MixtureSource(union(prefixed, originals), seed=config.seed)
    meter = FlopsMeter(
        num_parameters=count_parameters(config.model.path),
        collect_flops=_collect_flops(config, renderer),
    )
    services = CollectiveServices(
        {EXPORT: policy.export_weights}, limit_seconds=config.trainer.stall.export_seconds
    )
    supply = RolloutSupply(
        None if evaluator is None else Generator(evaluator, source, config),
        source,
        services=services,
        meter=meter,
        phases=phases,
    )
    stack.callback(supply.close)
    memory_explained = partial(
        explained,
        config,
        topology,
        phases,
        predicted_bytes=predicted_bytes,
        snapshots=folder.profile,
    )
    saves = RunSaves(
        config=config,
        folder=folder.checkpoints,
        saver=saver,
        policy=policy,
        supply=supply,
        meter=meter,
        phases=phases,
        warns=topology.is_first,
        input_digests=run_on_first(lambda: _digest_inputs(config, renderer)),
        memory_explained=memory_explained,
    )
    return Session(
        config=config,
        folder=folder,
        topology=topology,
        renderer=renderer,
        policy=policy,
        services=services,
        source=source,
        supply=supply,
        meter=meter,
        saves=saves,
        evaluation_sets=sets,
        evaluator=evaluator,
        metrics=None,
        progress=Progress("train", total=config.trainer.num_steps, enabled=False),
        phases=phases,
        profiler=profiler,
        predicted_bytes=predicted_bytes,
        memory_explained=memory_explained,
        hardware=read_hardware(
            topology, dtype=config.policy.dtype, configured_peak=config.trainer.peak_flops
        ),
        gap_alarm=GapAlarm(config.rollout, warns=topology.is_first),
        stack=stack,
    )


def _retention(config: CheckpointConfig) -> Retention:
    """Return the rules of ``[checkpoint]``."""
    return Retention(
        keep_last=config.keep_last,
        keep_every_steps=config.keep_every_steps,
        keep_best=config.keep_best,
    )


def _check_servers(rollout: RolloutConfig, topology: Topology) -> None:
    """Refuse servers that are too few, or that rank 0's machine has no GPUs for.

    All ranks call this. Where another engine takes the place of SGLang, no server needs a GPU.

    Raises:
        ConfigError: on every rank.
    """
    if rollout.engine != "transformers":
        rollout.sglang.check_min_servers(rollout.sglang.num_members)

    def check() -> None:
        if rollout.engine is None and not has_interpreter(rollout.sglang.python):
            return
        check_server_gpus(
            rollout, num_trainer_ranks=num_local_ranks(), num_gpus=torch.cuda.device_count()
        )

    if topology.device.type == "cuda":
        run_on_first(check)


def _digest_inputs(config: RunConfig, renderer: PromptRenderer) -> dict[str, str]:
    """Return the digests of what must stay the same although its path may change."""
    digests = {"tokenizer": renderer.tokenizer_hash, "prompts": renderer.chat_template_hash}
    if config.loss.kl != "none":
        reference = config.loss.reference_path or config.model.path
        digests["reference"] = digest_of_weights(reference)
    return digests


def _read_prefixed(
    config: RunConfig, renderer: PromptRenderer, problems: list[Problem]
) -> list[PrefixedProblem]:
    """Return the prefixed problems that ``prefixrl prefixes`` wrote."""
    prefixed = read_prefixes(
        config.prefixes_folder,
        problems,
        tokenizer_hash=renderer.tokenizer_hash,
        chat_template_hash=renderer.chat_template_hash,
        config=config.prefixes,
        max_total_tokens=config.rollout.max_total_tokens,
    )
    if not prefixed:
        raise ConfigError(
            f"{config.prefixes_folder}: holds no prefix of a training problem, so prefixrl would "
            "be plain RL; collect traces of these problems, or say --method rl"
        )
    return prefixed


def _collect_flops(config: RunConfig, renderer: PromptRenderer) -> float:
    """Return what the traces cost; 0 for a method that uses none."""
    if config.method == "rl":
        return 0.0
    store = TraceStore.open(
        config.traces_folder,
        tokenizer_hash=renderer.tokenizer_hash,
        chat_template_hash=renderer.chat_template_hash,
    )
    return store.total_flops()


def _check_supervised_phase(config: RunConfig, traces: Sequence[Trace]) -> None:
    """Refuse traces that the phase cannot be made of."""
    config.sft.check_phase(config.policy.optimizer, len(traces))
    check_trace_lengths({t.problem_id: t.num_tokens for t in traces}, config.stream_tokens)


def read_sft_traces(config: RunConfig, renderer: PromptRenderer) -> list[Trace]:
    """Return one trace per problem of the store, by id.

    The order decides what is held back and each batch. The store's own tells when each problem's
    round was written: a collection that was killed, or slower, has the same traces in another.

    Raises:
        ConfigError: if there is no store.
    """
    traces = read_traces(config, renderer)
    if not traces:
        raise ConfigError(
            f"method sft_then_rl: no traces in {config.traces_folder}; run prefixrl collect first"
        )
    return sorted(traces.values(), key=lambda trace: trace.trace_id)
