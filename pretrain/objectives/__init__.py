"""OBJECTIVES: the one table from the name in a config to the loss; `parallel.engine.Objective` is the contract."""

from pretrain.objectives.causal_lm import CausalLM
from pretrain.objectives.contrastive import Contrastive, SigLIP

OBJECTIVES = {"causal_lm": CausalLM, "contrastive": Contrastive, "siglip": SigLIP}
