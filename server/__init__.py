"""The coordinator: asks a cohort, adds up what it answers, takes the strategy's step."""
