"""Single changes of a config that save memory, as flags of the command line."""

from collections.abc import Iterator

from prefixrl_mcore.config.run import RunConfig


def knobs(config: RunConfig) -> Iterator[tuple[str, RunConfig]]:
    """Yield the flags of each change, and the config with it; the number of ranks stays.

    Whether training accepts it is not asked here: a layout may not go with the stream's length.
    """
    policy, parallel = config.policy, config.policy.parallel
    replicas = parallel.data_parallel_size * parallel.context_parallel_size
    changes: list[tuple[str, dict[str, object]]] = []
    if policy.recompute != "full":
        flags = "--policy.recompute full"
        if policy.recompute_modules is not None:
            flags += " --policy.recompute-modules None"
        changes.append((flags, {"recompute": "full", "recompute_modules": None}))
    if policy.recompute == "none":
        changes.append(("--policy.recompute selective", {"recompute": "selective"}))
    if replicas > 1 and not policy.optimizer.use_distributed_optimizer:
        optimizer = policy.optimizer.model_copy(update={"use_distributed_optimizer": True})
        changes.append(("--policy.optimizer.use-distributed-optimizer", {"optimizer": optimizer}))
    if parallel.tensor_model_parallel_size > 1 and not parallel.sequence_parallel:
        sharded = parallel.model_copy(update={"sequence_parallel": True})
        changes.append(("--policy.parallel.sequence-parallel", {"parallel": sharded}))
    memory_gb = policy.head.memory_gb / 4
    head = policy.head.model_copy(update={"memory_gb": memory_gb})
    changes.append((f"--policy.head.memory-gb {memory_gb:g}", {"head": head}))
    for flags, update in changes:
        yield flags, config.model_copy(update={"policy": policy.model_copy(update=update)})
    shortest = config.shortest_stream_tokens
    if config.stream_tokens > shortest:
        batch = config.batch.model_copy(update={"stream_tokens": shortest})
        yield f"--batch.stream-tokens {shortest}", config.model_copy(update={"batch": batch})
