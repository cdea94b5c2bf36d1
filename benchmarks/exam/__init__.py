"""The exam of `mup-megatron check`: mistakes as users make them, and right set-ups; `check_exam.py` sets it."""
