"""Where the loop over layers keeps finished layers and unfinished solvers."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from distributed_adaround.checkpoint.layer_files import Checkpoint, SolverStates
from distributed_adaround.errors import InputError, redact
from distributed_adaround.files import storage, uris
from distributed_adaround.runtime.comm import Comm, phase
from distributed_adaround.solve.record import LayerRecord


class Commits:
    """Keeps nothing: for `quantize`, whose caller gets the model."""

    def load(self, name: str) -> LayerRecord | None:
        """The record of a layer that was finished earlier. A collective."""
        return None

    def commit(self, record: LayerRecord) -> None:
        """Make a record permanent. A collective."""

    def save_state(self, layer: str, key: str, state: Mapping[str, Tensor]) -> None:
        """Keep the state of a layer's solver. No collective."""

    def load_state(self, layer: str, key: str) -> dict[str, Tensor] | None:
        """The state that was kept. No collective."""
        return None


class JobCommits(Commits):
    """Those of a job file, in its output. Rank 0 reads and writes records, all ranks get them."""

    def __init__(
        self, uri: str, fingerprint: Mapping[str, str], overwrite: bool, results: Sequence[str], comm: Comm
    ) -> None:
        """A collective. Raises InputError when the output holds another job's commits or results, unless overwrite.

        Args:
            uri: of the output.
            fingerprint: digests of what the result depends on.
            overwrite: replace what another job has left there.
            results: names of the files that jobs leave.
            comm: of all ranks.
        """
        self._comm = comm
        self._checkpoint: Checkpoint | None = None
        with phase(comm, "open the output"):
            self._states = SolverStates(uri, fingerprint)
            if comm.rank == 0:
                # Before any rank writes: all of them wait for this phase.
                for folder in ("", "commits", "commits/layers", "events"):
                    storage.remove_leftovers(uris.join(uri, folder))
                self._checkpoint = Checkpoint.open(uri, fingerprint, overwrite)
                # Results without commits of this job are somebody else's.
                for name in () if self._checkpoint.committed or overwrite else results:
                    if storage.exists(uris.join(uri, name)):
                        rule = "choose another output.uri, or set output.overwrite=true to replace it"
                        raise InputError(f"{redact(uri)}: {name} is there already, from another job; {rule}")
        committed = () if self._checkpoint is None else self._checkpoint.committed
        self.names: tuple[str, ...] = comm.broadcast_object(committed)

    def load(self, name: str) -> LayerRecord | None:
        if name not in self.names:
            return None
        record = None
        with phase(self._comm, f"load the commit of layer {name}"):
            if self._checkpoint is not None:
                record = self._checkpoint.load(name)
        loaded = self._comm.broadcast_object(record)
        assert isinstance(loaded, LayerRecord)
        return loaded

    def commit(self, record: LayerRecord) -> None:
        with phase(self._comm, f"commit layer {record.name}"):
            if self._checkpoint is not None:
                self._checkpoint.commit(record)
                self._states.clear()

    def save_state(self, layer: str, key: str, state: Mapping[str, Tensor]) -> None:
        self._states.save(layer, key, state)

    def load_state(self, layer: str, key: str) -> dict[str, Tensor] | None:
        return self._states.load(layer, key)
