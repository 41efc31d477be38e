"""`lrt-train study`: variants of a small model, each trained under several budgets, and a report of what recurrence bought.

`plan.py` says which runs there are, `cells.py` trains one, `runner.py` and `worker.py` all of them, `table.py`, `report.py` and
`plots.py` compare.
"""
