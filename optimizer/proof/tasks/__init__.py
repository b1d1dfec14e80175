"""Long-context tasks in the manner of RULER: what is hidden in a long text, and whether a model finds it.

from mla2dsa.optimizer.proof.tasks.long import Settings, run_long
result = run_long(Path("model-dsa"), Settings(lengths=(4096, 8192), depths=(0, 50, 100)))
print(result.accuracy("single", 4096, "dsa"), result.accuracy("single", 4096, "dense"))
"""
