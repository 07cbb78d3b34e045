//! Optimisation: parameter groups, AdamW state, learning-rate schedules.
