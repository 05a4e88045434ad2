"The command line on real data and a real base model that has never seen a chat token; and when it is killed"
import signal, time
import torch
from ftkit.train import last_checkpoint, read_log

FILES = {'gsm8k_train.jsonl': ('--mapping', 'instruction=question,output=answer'), 'alpaca_5000.part.jsonl': ()}

def command(shared, name, out, *extra):
    return ('sft', shared/'datasets'/name, '--model', shared/'models'/'stories260K', '--out', out, *FILES[name],
            '--max-length', 512, '--batch-size', 8, '--held-out', .02, '--max-steps', 20, '--save-steps', 5, *extra)

def measured(run, key): return [entry[key] for entry in read_log(run) if key in entry]

def falls(name, run):
    held = measured(run, 'eval_loss')
    print(f'{name}: held-out loss {held[0]:.3f} -> {held[-1]:.3f}')
    assert held[-1] < held[0]-.3

def test_held_out_loss_falls(ftkit, shared, tmp_path):
    name = 'gsm8k_train.jsonl'
    code,out,err = ftkit(*command(shared, name, 'run'))
    assert code == 0, err
    falls(name, tmp_path/'run')

def test_adapter_reloads_to_equal_logits(shared, tmp_path):
    from ftkit.formats import load
    from ftkit.mask import encode
    from ftkit.models import load_model, load_tokenizer, load_tuned
    from ftkit.train import train
    name = shared/'models'/'stories260K'
    tok = load_tokenizer(name)
    model = load_model(name, tok)
    ds = load(shared/'datasets'/'alpaca_5000.part.jsonl').select(range(64))
    run = train(model, tok, ds, out=tmp_path/'run', max_steps=5, max_length=512, learning_rate=5e-3)
    tok2,model2 = load_tuned(run.path)
    model.eval()
    for row in list(ds)[:4]:
        ids = encode(tok, row['messages'])['input_ids']
        assert encode(tok2, row['messages'])['input_ids'] == ids
        with torch.no_grad():
            x = torch.tensor([ids])
            tuned = model(input_ids=x).logits
            assert torch.equal(model2(input_ids=x).logits, tuned)
            with model2.disable_adapter(): assert not torch.equal(model2(input_ids=x).logits, tuned)

def test_killed_half_way_resumes_to_the_same_loss(ftkit, spawn, shared, tmp_path):
    name = 'alpaca_5000.part.jsonl'
    code,_,err = ftkit(*command(shared, name, 'unbroken'))
    assert code == 0, err
    falls(name, tmp_path/'unbroken')
    p,broken = spawn(*command(shared, name, 'broken')),tmp_path/'broken'
    def steps(): return len(measured(broken, 'loss')) if (broken/'log.jsonl').exists() else 0
    while p.poll() is None and steps() < 12: time.sleep(.01)
    p.send_signal(signal.SIGKILL)
    p.communicate()
    assert p.returncode == -signal.SIGKILL, 'it was killed, and not done before'
    assert 12 <= steps() < 15 and last_checkpoint(broken).name == 'checkpoint-10' and not (broken/'adapter').exists()
    code,_,err = ftkit(*command(shared, name, 'broken'))
    assert code == 2 and 'already holds a run: resume it' in err
    code,out,err = ftkit(*command(shared, name, 'broken', '--resume'))
    assert code == 0, err
    for key in ('loss', 'eval_loss'):
        a,b = (measured(tmp_path/run, key) for run in ('unbroken', 'broken'))
        print(f'{key}: unbroken {a[-1]:.6f}, resumed {b[-1]:.6f}')
        assert len(a) == len(b) and abs(a[-1]-b[-1]) < 1e-6
