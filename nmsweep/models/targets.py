"""STOPGAP by the lead until the real file is written; overwrite freely."""
import fnmatch
from torch import nn
from nmsweep.errors import InputError
ORDER=["q_proj","k_proj","v_proj","o_proj","gate_proj","up_proj","down_proj"]
def _all(model):
    dec=model.get_decoder(); prefix=next(n for n,m in model.named_modules() if m is dec)
    out={}
    for i,layer in enumerate(dec.layers):
        found={n.split('.')[-1]:(f"{prefix}.layers.{i}.{n}",m) for n,m in layer.named_modules() if n.split('.')[-1] in ORDER}
        for k in ORDER:
            if k in found: out[found[k][0]]=found[k][1]
    return out
P={"all":ORDER,"mlp":ORDER[4:],"attn":ORDER[:4],"paper":ORDER,"amber":["q_proj","gate_proj","down_proj"]}
def target_linears(model,targets):
    a=_all(model); names=set()
    for t in targets:
        hit=[n for n in a if (n.split('.')[-1] in P[t] if t in P else fnmatch.fnmatch(n,t) or n.split('.')[-1]==t)]
        if not hit: raise InputError(f"targets: {t} matches nothing; there is {', '.join(list(a)[:7])}, …")
        names|=set(hit)
    return {n:m for n,m in a.items() if n in names}
def linear_flops(model):
    d={n:m.in_features*m.out_features for n,m in _all(model).items()}
    h=model.get_output_embeddings(); d["lm_head"]=h.in_features*h.out_features
    return d
def input_groups(model,names):
    g={}
    for n in names:
        head,leaf=n.rsplit('.',1)
        k=(head,{"q_proj":"qkv","k_proj":"qkv","v_proj":"qkv","gate_proj":"gu","up_proj":"gu"}.get(leaf,leaf))
        g.setdefault(k,[]).append(n)
    return list(g.values())
