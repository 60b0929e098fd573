"""What the stages share: artifacts, models, prompts, sampling, grading, evaluation, a teacher, ranks."""
