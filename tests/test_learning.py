"Every objective on answers teaches the embedded model a taste: short answers instead of sentences"
import random
import pytest, torch
from ftkit.evaluate import exact_match
from ftkit.formats import convert
from ftkit.models import load_model, load_tokenizer
from ftkit.objectives import OBJECTIVES
from ftkit.tasks import pairs, rows, wordy
from ftkit.train import train

@pytest.fixture(scope='module')
def taught(tmp_path_factory):
    "(folder of a model that answers in both ways, its exact matches, its preference accuracy)"
    rng,tok = random.Random(0),load_tokenizer('embedded')
    model = load_model('embedded', tok)
    def said(r): return r['answer'] if rng.random() < .55 else wordy(r['answer'])
    both = [dict(messages=[r['messages'][0], dict(role='assistant', content=said(r))]) for r in rows(3000)]
    found = train(model, tok, both, out=tmp_path_factory.mktemp('taught')/'run', max_steps=150, learning_rate=3e-3,
                  per_device_train_batch_size=32)
    return found.path, exact_match(model, tok, rows(100, 'test')).accuracy, preferred(model, tok)

def preferred(model, tok):
    "Share of held-out pairs whose preferred answer is likelier"
    from ftkit.logps import answer_logps, by_answer, head, sequence_logps
    obj = OBJECTIVES['dpo']
    batch = obj.collate(tok, model)(list(obj.prepare(tok, pairs(200, 'test', 'wordy'))))
    model.eval()
    with torch.no_grad(): logps = answer_logps(model, head(model), batch).logps
    chosen,rejected = sequence_logps(by_answer(logps, batch['lengths'])[0]).view(-1, 2).T
    return (chosen > rejected).float().mean().item()

def tuned(folder):
    "The taught model, its adapter trained on"
    from peft import PeftModel
    from ftkit.models import load_tuned
    tok,model = load_tuned(folder)
    for name,p in model.named_parameters(): p.requires_grad_('lora' in name or 'trainable_tokens_delta' in name)
    assert isinstance(model, PeftModel)
    return model, tok

@pytest.mark.parametrize('objective,rate', dict(dpo=3e-4, kto=5e-4, orpo=1e-3).items())
def test_a_taste_is_learned_and_nothing_forgotten(taught, tmp_path, objective, rate):
    folder,right,before = taught
    model,tok = tuned(folder)
    data = pairs(1000, worse='wordy', seed=5)
    if objective == 'kto': data = convert(data, 'unpaired')
    train(model, tok, data, objective, out=tmp_path/'run', max_steps=40, learning_rate=rate,
          per_device_train_batch_size=16)
    after,still = preferred(model, tok),exact_match(model, tok, rows(100, 'test')).accuracy
    print(f'{objective}: preference accuracy {before:.2f} to {after:.2f}, exact match {right:.0%} to {still:.0%}')
    assert .3 <= before <= .7 and after >= .85 and still >= right - .05

def test_a_reward_model_learns_it(tmp_path):
    tok = load_tokenizer('embedded')
    model = load_model('embedded', tok, reward=True)
    found = train(model, tok, pairs(1000, worse='wordy'), 'reward', out=tmp_path/'run', max_steps=40,
                  learning_rate=1e-3, eval_data=pairs(200, 'test', 'wordy'), per_device_train_batch_size=16)
    log = [e['eval_accuracy'] for e in found.log if 'eval_accuracy' in e]
    print(f'reward: accuracy on held-out pairs {log[0]:.2f} to {log[-1]:.2f}')
    assert log[0] < .9 <= log[-1]
    from ftkit.models import load_tuned
    from ftkit.objectives import reward_head, rewards
    tok,again = load_tuned(found.path)
    obj = OBJECTIVES['reward']
    batch = obj.collate(tok, again)(list(obj.prepare(tok, pairs(20, 'test', 'wordy'))))
    model.eval()
    with torch.no_grad(): a,b = (rewards(m, reward_head(m), batch) for m in (model, again))
    torch.testing.assert_close(a, b)
