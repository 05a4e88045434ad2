"QLoRA on a CPU: the first tutorial's task with the frozen weights in four bits, and both ways to merge the result"
import torch
from ftkit.core import Device, profile
from ftkit.evaluate import exact_match
from ftkit.models import load_model, load_tokenizer, load_tuned, merge
from ftkit.tasks import check, rows
from ftkit.train import train

def accuracy(model, tok): return exact_match(model, tok, rows(160, 'test'), check, max_new_tokens=24).accuracy

def test_qlora_gains_what_lora_gains_and_merges_best_into_what_it_saw(tmp_path, monkeypatch):
    monkeypatch.setenv('IN_TEST', '1')
    p,tok,gain = profile(Device()),load_tokenizer('embedded'),{}
    size = p.per_device_train_batch_size//2 # which is enough for a comparison; the demo has all rows
    data = rows(p.max_steps*size)
    for adapter in ('lora', 'qlora'):
        model = load_model('embedded', tok, adapter, 'fp32')
        before = accuracy(model, tok)
        train(model, tok, data, out=tmp_path/adapter, max_length=p.max_length, precision='fp32', max_steps=p.max_steps,
              learning_rate=p.learning_rate, per_device_train_batch_size=size)
        gain[adapter] = accuracy(model, tok) - before
    print({a: f'{g:.1%}' for a,g in gain.items()})
    assert gain['lora'] > .7 and gain['qlora'] >= .9*gain['lora']
    checkpoint = next((tmp_path/'qlora').glob('checkpoint-*'))
    assert load_tuned(checkpoint)[1].is_loaded_in_4bit # as it was trained, though only the run says so
    scores = {}
    for route in ('base', 'dequantized'):
        done = merge(tmp_path/'qlora', tmp_path/route, route=route)
        scores[route] = accuracy(load_tuned(tmp_path/route)[1], tok)
    print(scores, done)
    assert done.distance['dequantized'] < done.distance['base']/3
    assert abs(scores['dequantized'] - gain['qlora']) < .03

def test_trl_trains_adapters_of_four_bits_in_32(tmp_path):
    "It narrows them to bf16 itself, which fp16 cannot train"
    tok = load_tokenizer('embedded')
    model = load_model('embedded', tok, 'qlora', 'fp32', trainable_token_indices=None)
    log = train(model, tok, rows(16), out=tmp_path/'run', engine='trl', max_steps=1, per_device_train_batch_size=2).log
    assert log and {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
