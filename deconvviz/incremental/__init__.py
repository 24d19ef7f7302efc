"""Exact re-inference of only what a patch changed (Krypton's algebra, SIGMOD 2019), for any recorded pass.

:class:`CleanPass` holds the pass without a patch; a :class:`Plan` says, for one batch of windows, which box of each
value changes and how it is computed (the table :data:`~deconvviz.incremental.forms.FORMS`); ``plan.run(patches)``
computes it. A step without a form, or whose box covers nearly all, is computed on whole values, so the result is
right for every operation.
"""

from deconvviz.incremental.alike import alike
from deconvviz.incremental.clean import CleanPass
from deconvviz.incremental.plan import Outcome, Plan

__all__ = ["CleanPass", "Outcome", "Plan", "alike"]
