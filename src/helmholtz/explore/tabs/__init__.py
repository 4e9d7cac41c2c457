"""Controls and what they call, a module per tab. Each takes the module ``gradio`` and the runs on offer."""

from helmholtz.explore.tabs import plan, read

TABS = {"Read": read.fill, "Plan": plan.fill}
