"""Metrics: functions of a run's output to one number per example, with their answers as array leaves.

Each metric computes only the logits that it needs. New answers of the same shape never recompile. A user's metric
is any function of the `Out`; wrap it in `Function` where it reads activations, or subclass `Metric` where it holds
arrays.
"""

from mijax.metrics.answers import Accuracy as accuracy
from mijax.metrics.answers import Logit as logit
from mijax.metrics.answers import LogitDiff as logit_diff
from mijax.metrics.answers import LogProb as log_prob
from mijax.metrics.answers import Prob as prob
from mijax.metrics.answers import Rank as rank
from mijax.metrics.distributions import KL as kl
from mijax.metrics.distributions import CrossEntropy as cross_entropy
from mijax.metrics.metric import AnyMetric, Function, Metric, position

__all__ = [
    "AnyMetric",
    "Function",
    "Metric",
    "accuracy",
    "cross_entropy",
    "kl",
    "log_prob",
    "logit",
    "logit_diff",
    "position",
    "prob",
    "rank",
]
