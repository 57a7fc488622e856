"""What a machine will do with a model, computed before anything starts: `lightmoe plan`.

`memory.py` says what lies where, `layouts.py` how fast expert parallelism and its alternatives are,
`report.py` puts both side by side.
"""

from lightmoe.plan.layouts import Layout
from lightmoe.plan.memory import Memory, Wish
from lightmoe.plan.report import Plan, make_plan, render

__all__ = ["Layout", "Memory", "Plan", "Wish", "make_plan", "render"]
