"""What objectives share that compute with the decoder and output head of supervised fine-tuning."""

from llamahome.model.backends.backend import Backend
from llamahome.model.load import CausalLM
from llamahome.model.objective import Objective


class OverSupervised:
    """An objective whose passes are those of `supervised`."""

    supervised: Objective

    @property
    def model(self) -> CausalLM:
        """The causal language model with its adapters."""
        return self.supervised.model

    @property
    def backend(self) -> Backend:
        """Computes the passes."""
        return self.supervised.backend
