"""Controls and what they call, a module per tab. Each takes the module ``gradio`` and the runs on offer."""

from helmholtz.explore.tabs import compare, equilibrium, plan, read

TABS = {"Read": read.fill, "Plan": plan.fill, "Equilibrium": equilibrium.fill, "Compare": compare.fill}
