"""`nmsweep status [results_dir=DIR] [plan=ID] [limit=N]`: how far a sweep is."""

from collections.abc import Sequence

from nmsweep.commands.words import key_values, stored_plan, whole_number
from nmsweep.sweep.plan import plan_ids
from nmsweep.sweep.status import show_status


def main(words: Sequence[str]) -> int:
    """Show how far a sweep is; 1 if a cell failed."""
    values = key_values(words, ["results_dir", "plan", "limit"])
    limit = whole_number(values, "limit", 20)
    plan = stored_plan(values)
    n_failed = show_status(plan, limit)
    others = [plan_id for plan_id in plan_ids(plan.results_dir) if plan_id != plan.plan_id]
    if others and "plan" not in values:
        print(f"{len(others)} other plans: plan=ID shows one of {', '.join(others[:3])}{', …' if others[3:] else ''}")
    return int(n_failed > 0)
