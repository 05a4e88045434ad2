"The tables against the ledger of the guide's claims, and a run that follows a schedule"
import csv, re
import pytest
from ftkit.hparams import DISPUTES, RANGES, check, recommend, schedule, schedule_options

@pytest.fixture(scope='module')
def ledger(shared):
    text = (shared.parent/'reference'/'seed_numbers.csv').read_text()
    return {row['id']: row for row in csv.DictReader(text.splitlines())}

def numbers(text): return [float(x) for x in re.findall(r'\d+(?:\.\d+)?(?:e-?\d+)?', text)]

@pytest.mark.parametrize('found', RANGES, ids=lambda r: r.claim)
def test_every_range_stands_in_the_ledger(ledger, found):
    row = ledger[found.claim]
    assert found.source.split()[-1] in row['line'].split()
    assert found.source.startswith('agent reference' if row['seed_file'].startswith('002') else 'guide')
    said = numbers(row['value'])
    if found.claim == 'n094': said = [1, *said]                  # only the upper end is said
    if found.claim == 'n117': said = [said[0], *numbers(row['condition'])]
    assert [found.low, found.high] == said[:1] + said[-1:]
    if found.adapter != 'any': assert row['condition'].lower().startswith(found.adapter)

def test_every_claim_exists(ledger):
    told = [claim for d in DISPUTES for claim in d.said]
    told += [c for a in ('lora', 'qlora', 'full') for m in ('sft', 'dpo') for text in recommend(m, a).reasons.values()
             for c in re.findall(r'n\d{3}', text)]
    assert len(told) > 30 and set(told) <= ledger.keys()
    said = [pair for d in DISPUTES for pair in d.said.items() if pair[0] != 'n095'] # which says 2r in words
    assert all(set(numbers(text)) & set(numbers(ledger[claim]['value'])) for claim,text in said)

def test_a_number_that_no_source_has_is_noticed(ledger):
    wrong = RANGES[0]._replace(high=4e-4)
    with pytest.raises(AssertionError): test_every_range_stands_in_the_ledger(ledger, wrong)

@pytest.mark.parametrize('name', ['linear', 'cosine', 'constant'])
def test_training_follows_the_schedule(tmp_path, name):
    from ftkit.chat import set_template
    from ftkit.tasks import rows
    from ftkit.tiny import tiny
    from ftkit.train import train
    tok,model = tiny()
    set_template(tok)
    run = train(model, tok, rows(32), out=tmp_path/'run', **schedule_options(name, 20, warmup=.1))
    rates = [e['learning_rate'] for e in run.log if 'loss' in e]
    assert rates == pytest.approx(schedule(name, 20, warmup=.1)[:20], abs=1e-12)

@pytest.mark.parametrize('adapter', ['lora', 'qlora', 'full'])
@pytest.mark.parametrize('method', ['sft', 'dpo', 'kto', 'orpo', 'reward'])
def test_recommendations_are_in_the_guides_range(method, adapter):
    config = recommend(method, adapter, rows=500, gpus=2, per_device=3).config
    low = config.pop('learning_rate')
    assert 1e-6 <= low <= 1e-3
    assert check(config, adapter) == [] or [f.name for f in check(config, adapter)] == ['gradient_accumulation_steps']
    assert config['per_device_train_batch_size'] <= 3
    assert config['per_device_train_batch_size']*config['gradient_accumulation_steps']*2 == 32

@pytest.mark.parametrize('method', ['dpo', 'kto', 'orpo', 'reward'])
def test_rates_without_a_claim_are_trls_defaults(method):
    from trl import DPOConfig, KTOConfig, RewardConfig
    from trl.experimental.orpo import ORPOConfig
    config = dict(dpo=DPOConfig, kto=KTOConfig, orpo=ORPOConfig, reward=RewardConfig)[method]
    assert recommend(method, 'full').config['learning_rate'] == config.__dataclass_fields__['learning_rate'].default
