"""The report of a smoke test: what a few real steps predict for the whole run."""

import statistics

from .console import format_duration
from .plan import Plan
from .throughput import Clock, Peak

# The first updates of a process still allocate memory and warm up.
WARMUP_UPDATES = 2


def describe_smoke_test(plan: Plan, clock: Clock, peak: Peak, peak_memory_gb: float) -> list[str]:
    """Describe what was measured, and the projected duration of the whole run.

    Args:
        clock: must have timed `update`, `evaluation` and `checkpoint`.
    """
    config, updates = plan.config, clock.seconds["update"]
    update = statistics.median(updates[WARMUP_UPDATES:] or updates)
    evaluation, checkpoint = (statistics.mean(clock.seconds[name] or [0.0]) for name in ("evaluation", "checkpoint"))
    rate = config.tokens_per_step / update
    mfu = rate * plan.flops_per_token / (plan.n_processes * peak.flops)
    # The smoke test times validation, HellaSwag and samples together; the projection uses the shortest interval.
    every = min((n for n in (config.eval_every, config.hellaswag_every, config.sample_every) if n), default=0)
    seconds = (
        plan.max_steps * update + plan.count_due(every) * evaluation + plan.count_due(config.save_every) * checkpoint
    )
    return [
        f"measured    {rate:,.0f} tokens/s, {update:.2f} s per update (median of {len(updates[WARMUP_UPDATES:])}), "
        f"MFU {mfu:.1%} of {peak.flops / 1e12:,.2f} TFLOP/s per process ({peak.source})",
        f"memory      {peak_memory_gb:.2f} GB peak, in one process",
        f"overhead    {evaluation:.1f} s per evaluation, {checkpoint:.1f} s per checkpoint (reloaded bit for bit)",
        f"whole run   about {format_duration(seconds)} for {plan.max_steps:,} steps, evaluations included",
    ]
