"What figures were measured on, and where they are kept: bench/results"
import json, os, platform, re
from datetime import date
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).resolve().parent/'results'
SHARED = RESULTS.parents[2]/'shared'
DATA = 'the shared data sets' if SHARED.is_dir() else "ftkit's own tasks"
PACKAGES = 'torch', 'transformers', 'peft', 'trl', 'datasets', 'tokenizers', 'bitsandbytes'

def conditions():
    "Processor, cores, GPU, day and versions"
    import torch
    info = Path('/proc/cpuinfo')
    named = re.search(r'model name\s*: (.+)', info.read_text()) if info.exists() else None
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return dict(day=f'{date.today()}', processor=named[1] if named else platform.processor(), cores=os.cpu_count(),
                gpu=gpu, python=platform.python_version(), **{p: version(p) for p in PACKAGES})

def keep(name, **found):
    "Write what was found, and on what"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS/f'{name}.json').write_text(json.dumps(dict(conditions=conditions(), **found), indent=1) + '\n')
