"The same road on a GPU: pytest -m cuda"
import pytest, torch
from ftkit.core import Device
from ftkit.models import load_model, load_tokenizer, load_tuned
from ftkit.tasks import rows
from ftkit.train import train
from test_objectives import ANSWERED, CASES, column, run, test_every_step_equals_trls as parity
from test_rl_learning import PPO, taught, test_more_held_out_tasks_are_solved as learns # noqa: F401

pytestmark = pytest.mark.cuda

@pytest.mark.parametrize('adapter', ['lora', 'qlora', 'full'])
@pytest.mark.parametrize('precision', ['fp32', 'fp16', 'bf16'])
def test_tunes_saves_and_loads(tmp_path, adapter, precision):
    if precision == 'bf16' and not Device.detect().bf16: pytest.skip('no bf16 on this GPU')
    tok = load_tokenizer('embedded')
    model = load_model('embedded', tok, adapter, precision)
    run = train(model, tok, rows(320), out=tmp_path/'run', max_steps=20, per_device_train_batch_size=16,
                learning_rate=2e-3, precision=precision)
    losses = [e['loss'] for e in run.log if 'loss' in e]
    assert losses[-1] < losses[0]-1
    tok2,model2 = load_tuned(run.path, precision)
    ids = tok('The capital of France is', return_tensors='pt').input_ids.cuda()
    with torch.no_grad(): a,b = (m.eval()(input_ids=ids).logits.float() for m in (model, model2))
    # a fully tuned model is trained in fp32 and read back in the precision asked for: three digits in bf16
    torch.testing.assert_close(a, b, atol=.1, rtol=.05)

@pytest.mark.parametrize('case', CASES)
def test_every_step_equals_trls_here_too(tmp_path, case): parity(tmp_path, case, 'lora')

@pytest.mark.parametrize('precision', ['fp16', 'bf16'])
@pytest.mark.parametrize('objective', ['sft', *ANSWERED])
def test_half_the_bits(tmp_path, objective, precision):
    "Autocast, in fp16 with its scaler: the losses of fp32 but for the rounding"
    whole,half = (run(tmp_path, objective, 'lora', max_steps=8, precision=p, name=p) for p in ('fp32', precision))
    a,b = column(whole, 'loss'),column(half, 'loss')
    assert len(b) == 8 and b.isfinite().all()
    # the scaler may skip a step or two until its scale fits
    torch.testing.assert_close(a, b, atol=.05*max(1, a.max().item()), rtol=0)

def test_fp16_scales_its_gradients(tmp_path, monkeypatch):
    "The optimizer gets them as in fp32 after they were too small for fp16 without the scale"
    from torch.amp import GradScaler
    scales,step = [],GradScaler.step
    def look(self, *args, **kwargs):
        scales.append(self.get_scale())
        return step(self, *args, **kwargs)
    monkeypatch.setattr(GradScaler, 'step', look)
    run(tmp_path, 'dpo', 'lora', max_steps=3, precision='fp16')
    assert len(scales) == 3 and min(scales) > 1
    run(tmp_path, 'dpo', 'lora', max_steps=3, precision='bf16', name='bf16')
    assert len(scales) == 3

@pytest.mark.parametrize('engine', ['ftkit', 'trl'])
def test_the_record_has_the_gpus_peak(tmp_path, engine):
    found = run(tmp_path, 'dpo', 'lora', max_steps=2, engine=engine)
    assert found.record['hardware']['kind'] == 'cuda' and 2**16 < found.record['peak_memory'] < 2**32

@pytest.mark.parametrize('algorithm,gain,more', [('grpo', .25, dict(steps=200)), ('rloo', .15, dict(steps=120)),
                                                 ('ppo', .15, PPO)])
def test_rewards_are_learned_from_here_too(taught, tmp_path, algorithm, gain, more): # noqa: F811
    learns(taught, tmp_path, algorithm, 1, gain, more)
