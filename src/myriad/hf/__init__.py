"""Models of Myriad in Hugging Face's transformers. Importing this registers them:

import myriad.hf
model = AutoModelForCausalLM.from_pretrained(RUN)
"""

from transformers.models.auto.configuration_auto import AutoConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from myriad.hf.config import MyriadConfig
from myriad.hf.generation import Generation, OpenModel, generate_text, open_model
from myriad.hf.model import ContextError, MyriadForCausalLM, MyriadOutput

AutoConfig.register(MyriadConfig.model_type, MyriadConfig, exist_ok=True)
AutoModelForCausalLM.register(MyriadConfig, MyriadForCausalLM, exist_ok=True)

__all__ = [
    "ContextError",
    "Generation",
    "MyriadConfig",
    "MyriadForCausalLM",
    "MyriadOutput",
    "OpenModel",
    "generate_text",
    "open_model",
]
