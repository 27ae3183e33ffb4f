"""Looking at a server that came up: is it what the settings say, and the same as the others?"""

import threading
from pathlib import Path

from prefixrl_mcore.config.policy import LogitsDtype
from prefixrl_mcore.config.rollout import SGLangConfig
from prefixrl_mcore.rollout.sglang.determinism import check_determinism
from prefixrl_mcore.rollout.sglang.gpus import reported_gpus
from prefixrl_mcore.rollout.sglang.identity import (
    check_layout,
    check_memory_release,
    check_model,
    check_sampling,
    check_versions,
)
from prefixrl_mcore.rollout.sglang.member import Member, State
from prefixrl_mcore.rollout.sglang.precision import check_logits
from prefixrl_mcore.rollout.sglang.protocol import ServerProtocol


class Inspector:
    """Inspects servers as they come up, each in a thread, and remembers what it saw."""

    def __init__(
        self,
        model_folder: Path,
        config: SGLangConfig,
        *,
        logits_dtype: LogitsDtype,
        colocated: bool,
    ) -> None:
        """Begin with no server seen.

        Args:
            model_folder: what servers are to serve.
            config: their settings.
            logits_dtype: precision of a bfloat16 model's logits.
            colocated: they sleep beside the trainer; those on this machine share this run's GPUs.
        """
        self._model_folder = model_folder
        self._config = config
        self._logits_dtype: LogitsDtype = logits_dtype
        self._colocated = colocated
        self._lock = threading.Lock()  # servers come up in threads
        self._versions: dict[Member, tuple[int, str]] = {}  # its life and version
        self._protocols: dict[Member, ServerProtocol] = {}
        self.version = "of unknown version"
        """SGLang's version on the servers."""

    @property
    def all_deterministic(self) -> bool:
        """Whether the seeds of requests decide what all servers answer."""
        return all(protocol.is_deterministic for protocol in self._protocols.values())

    @property
    def all_have_prefix_cache(self) -> bool:
        """Whether all servers keep contexts for later requests."""
        return all(protocol.has_prefix_cache for protocol in self._protocols.values())

    def inspect(self, member: Member) -> None:
        """Note what a server that came up is.

        Raises:
            ServerFault: if it does not say.
            EngineError: if it is not what the settings say, or of another version than the others.
        """
        client = member.client
        info = client.server_info()
        version = client.detect_protocol(info).version
        check_layout(info, self._config, url=client.url)
        model_info = client.model_info()
        check_model(model_info, self._model_folder, url=client.url)
        check_sampling(model_info, url=client.url)
        self._note_version(member, version)
        check_logits(info, self._config, self._logits_dtype)
        check_determinism(info, self._config)
        if self._colocated:
            check_memory_release(client.protocol, info, url=client.url)
            if member.is_here and not member.is_own:  # in each life: they may be others
                member.gpus = reported_gpus(info, url=client.url)
        self._protocols[member] = client.protocol

    def _note_version(self, member: Member, version: str) -> None:
        """Compare a server's version with those of the others in their present lives."""
        with self._lock:
            others = [
                of_other
                for other, (life, of_other) in self._versions.items()
                if other is not member and other.life == life and other.state is not State.DEAD
            ]
            check_versions(version, others, url=member.client.url)
            self._versions[member] = (member.life, version)
        self.version = version
