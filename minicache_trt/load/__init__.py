"""Load on a serving endpoint, and what it answers: who sends what when, and what came back when."""
