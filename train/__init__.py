"""The training loop and everything judged by it: methods, models, evaluation, report."""
