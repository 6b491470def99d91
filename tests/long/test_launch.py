"""torchrun, as one types it: a grid on two processes, and one that fails stops the other."""
import subprocess
import sys
import time

from robustcv.core import load_records

def torchrun(*args, timeout=300):
    call = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *map(str, args)]
    return subprocess.run(call, capture_output=True, text=True, timeout=timeout)

def test_a_grid_on_two_processes(tmp_path):
    done = torchrun("-m", "robustcv", "run", "baseline", "--scale", "smoke", "--only", "plain", "--device", "cpu", "--results", tmp_path/"results", "--folder", tmp_path/"runs")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": validation") == 1 and done.stdout.count("baseline: scale smoke") == 1 and len(load_records(tmp_path/"results")) == 1

def test_a_process_that_fails_stops_the_others(tmp_path):
    (tmp_path/"script.py").write_text("""
import os, torch
from robustcv.data import ImageSet
from robustcv.training import Training, cross_entropy, fit
def objective(model, batch, backward):
    if os.environ["RANK"] == "1": raise RuntimeError("the second process has had enough")
    return cross_entropy(model, batch)
images = ImageSet(torch.zeros(16, 3, 8, 8, dtype=torch.uint8), torch.arange(16) % 2, ("a", "b"))
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2))
fit(model, images, images, objective, config=Training(epochs=2, batch_size=8, lr=.01), device="cpu")
""")
    start = time.monotonic()
    done = torchrun(tmp_path/"script.py")
    assert done.returncode != 0 and "the second process has had enough" in done.stderr and time.monotonic() - start < 120
