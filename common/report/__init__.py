"""Reports one can look at: a run, or arms over seeds, each one self-contained HTML file."""

from common.report.comparison import comparison_sentences, comparison_text, write_comparison
from common.report.experiment import experiment_sentences, write_experiment
from common.report.run import write_run_report

__all__ = [
    "comparison_sentences",
    "comparison_text",
    "experiment_sentences",
    "write_comparison",
    "write_experiment",
    "write_run_report",
]
