"The same road on a GPU: pytest -m cuda"
import pytest, torch
from ftkit.core import Device
from ftkit.models import load_model, load_tokenizer, load_tuned
from ftkit.tasks import rows
from ftkit.train import train

@pytest.mark.cuda
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
