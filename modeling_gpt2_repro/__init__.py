"""GPT-2 reproduced from raw text, native to the Hugging Face ecosystem.

Importing the package registers the model with the Auto classes, so `AutoModelForCausalLM.from_pretrained` loads the
checkpoints of a run.
"""

from .core import environment  # noqa: F401  before the libraries, which read it at import

# isort: split
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_gpt2_repro import MODEL_SIZES, GPT2ReproConfig
from .modeling_gpt2_repro import GPT2ReproForCausalLM, GPT2ReproModel, GPT2ReproPreTrainedModel

__version__ = "0.1.0"

AutoConfig.register(GPT2ReproConfig.model_type, GPT2ReproConfig)
AutoModel.register(GPT2ReproConfig, GPT2ReproModel)
AutoModelForCausalLM.register(GPT2ReproConfig, GPT2ReproForCausalLM)

__all__ = ["MODEL_SIZES", "GPT2ReproConfig", "GPT2ReproForCausalLM", "GPT2ReproModel", "GPT2ReproPreTrainedModel"]
