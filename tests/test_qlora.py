"QLoRA on a CPU: the first tutorial's task with the frozen weights in four bits, and both ways to merge the result"
from ftkit.core import Device, profile
from ftkit.evaluate import exact_match
from ftkit.models import load_model, load_tokenizer, load_tuned, merge
from ftkit.tasks import check, rows
from ftkit.train import train

def accuracy(model, tok): return exact_match(model, tok, rows(160, 'test'), check, max_new_tokens=24).accuracy

def test_qlora_gains_what_lora_gains_and_merges_best_into_what_it_saw(tmp_path, monkeypatch):
    monkeypatch.setenv('IN_TEST', '1')
    p,tok,gain = profile(Device()),load_tokenizer('embedded'),{}
    data = rows(p.max_steps*p.per_device_train_batch_size)
    for adapter in ('lora', 'qlora'):
        model = load_model('embedded', tok, adapter, 'fp32')
        before = accuracy(model, tok)
        train(model, tok, data, out=tmp_path/adapter, max_length=p.max_length, precision='fp32', max_steps=p.max_steps,
              learning_rate=p.learning_rate, per_device_train_batch_size=p.per_device_train_batch_size)
        gain[adapter] = accuracy(model, tok) - before
    print({a: f'{g:.1%}' for a,g in gain.items()})
    assert gain['lora'] > .8 and gain['qlora'] >= .9*gain['lora']
    scores = {}
    for route in ('base', 'dequantized'):
        done = merge(tmp_path/'qlora', tmp_path/route, route=route)
        scores[route] = accuracy(load_tuned(tmp_path/route)[1], tok)
    print(scores, done)
    assert done.distance['dequantized'] < done.distance['base']/3
    assert abs(scores['dequantized'] - gain['qlora']) < .03
