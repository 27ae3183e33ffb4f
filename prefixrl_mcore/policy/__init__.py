"""The Megatron boundary: nothing outside this package and ``checkpoint`` imports megatron."""

from prefixrl_mcore.policy.cpu_runtime import silence_known_messages

silence_known_messages()
