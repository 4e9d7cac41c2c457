"""The MAD study at sizes that train in a moment."""

from helmholtz.experiments.mad.data import Compression, InContextRecall, MadSetting
from helmholtz.experiments.mad.models import MadSizes
from helmholtz.experiments.mad.run import MadProfile
from helmholtz.experiments.mad.training import MadProtocol

SIZES = MadSizes(d_model=16, n_heads=2, d_ff=48, n_patterns=4)
RECALL = MadSetting(
    task_name="in-context-recall", task=InContextRecall(vocab_size=8, seq_len=12), n_train=48, n_test=24
)
SQUEEZE = MadSetting(
    task_name="compression", task=Compression(vocab_size=8, seq_len=6), n_train=48, n_test=24
)


def protocol(**changes):
    values = {"batch_size": 16, "steps": 6, "n_evaluations": 3, "evaluation_batch_size": 16}
    return MadProtocol(**(values | changes))


def profile(**changes):
    values = {
        "settings": {"compression": (SQUEEZE,), "in-context-recall": (RECALL,)},
        "models": ("attention", "fem_softmax"),
        "seeds": (0, 1),
        "lrs": (1e-3,),
        "weight_decays": (0.1,),
        "protocol": protocol(),
        "sizes": SIZES,
    }
    return MadProfile(**(values | changes))
