"""What a trial of a few real steps says about the whole run."""

import statistics

from .console import format_duration
from .plan import Plan
from .throughput import Clock, Peak

# The first updates of a process still allocate and warm up.
WARMUP_UPDATES = 2


def describe_smoke_test(plan: Plan, clock: Clock, peak: Peak, peak_memory_gb: float) -> list[str]:
    """Say in lines what was measured, and how long the whole run takes at that.

    Args:
        clock: with `update`, `evaluation` and `checkpoint`.
    """
    config, updates = plan.config, clock.seconds["update"]
    update = statistics.median(updates[WARMUP_UPDATES:] or updates)
    evaluation, checkpoint = (statistics.mean(clock.seconds[name] or [0.0]) for name in ("evaluation", "checkpoint"))
    rate = config.tokens_per_step / update
    mfu = rate * plan.flops_per_token / (plan.n_processes * peak.flops)
    # Validation, HellaSwag and samples come at one step in the trial, and in the run as often as the first of them.
    every = min((n for n in (config.eval_every, config.hellaswag_every, config.sample_every) if n), default=0)
    seconds = (
        plan.max_steps * update + plan.count_due(every) * evaluation + plan.count_due(config.save_every) * checkpoint
    )
    return [
        f"measured    {rate:,.0f} tokens/s, {update:.2f} s an update (median of {len(updates[WARMUP_UPDATES:])}), MFU "
        f"{mfu:.1%} of {peak.flops / 1e12:,.2f} TFLOP/s a process ({peak.source})",
        f"memory      {peak_memory_gb:.2f} GB at most, in one process",
        f"apart       {evaluation:.1f} s an evaluation, {checkpoint:.1f} s a checkpoint, which came back bit by bit",
        f"whole run   about {format_duration(seconds)} for {plan.max_steps:,} steps, evaluations included",
    ]
