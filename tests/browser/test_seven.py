"The widgets' Python side under ipywidgets 7.7.1, which is Colab's"
import os, subprocess, sys
from pathlib import Path
import pytest

pytestmark = pytest.mark.browser
SEVEN = Path(os.environ.get('FTKIT_IPYWIDGETS_7', Path(sys.prefix)/'ipywidgets7'))

def run(*args):
    env = os.environ | dict(PYTHONPATH=str(SEVEN), HF_HUB_OFFLINE='1', OMP_NUM_THREADS='1')
    return subprocess.run([sys.executable, *map(str, args)], env=env, text=True, capture_output=True)

def test_every_widget_works_in_ipywidgets_7():
    if not SEVEN.is_dir(): pytest.skip(f'no ipywidgets 7 at {SEVEN}: run `make browser`')
    assert run('-c', 'import ipywidgets; print(ipywidgets.__version__)').stdout == '7.7.1\n'
    tests = run('-m', 'pytest', '-p', 'no:cacheprovider', Path(__file__).parents[1]/'test_widgets.py')
    assert tests.returncode == 0, tests.stdout[-4000:]
