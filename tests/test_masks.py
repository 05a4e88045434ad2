"Labels against TRL's own preparation, on real rows"
import pytest
from datasets import Dataset
from ftkit.chat import set_template
from ftkit.formats import load
from ftkit.mask import encode_dataset
from ftkit.tiny import tiny

def prepared_by_trl(tok, model, rows, out, **options):
    "(ids, labels) as TRL's trainer and collator make them"
    from trl import SFTConfig, SFTTrainer
    config = SFTConfig(output_dir=str(out), max_length=None, packing=False, report_to='none', use_cpu=True, bf16=False,
                       gradient_checkpointing=False, per_device_train_batch_size=1, **options)
    trainer = SFTTrainer(model, config, train_dataset=Dataset.from_list(rows), processing_class=tok)
    batches = [trainer.data_collator([row]) for row in trainer.train_dataset]
    return [(b['input_ids'][0].tolist(), b['labels'][0].tolist()) for b in batches]

@pytest.fixture
def chat_model():
    tok,model = tiny()
    set_template(tok)
    return tok, model

def test_assistant_only_labels_equal_trl_on_1000_rows(shared, chat_model, tmp_path):
    names = dict(alpaca_5000='alpaca_5000.part.jsonl', sharegpt='sharegpt_fastchat_dummy.jsonl')
    ds = [r['messages'] for name in names.values() for r in load(shared/'datasets'/name).select(range(250))]
    ds += [r['messages'] for r in load(shared/'datasets'/'alpaca_gpt4_en_demo.jsonl')]
    rows = [dict(messages=[dict(role=m['role'], content=m['content']) for m in row]) for row in ds]
    theirs = prepared_by_trl(*chat_model, rows, tmp_path, assistant_only_loss=True)
    ours = encode_dataset(chat_model[0], rows)
    assert len(rows) == 1000 and [(r['input_ids'], r['labels']) for r in ours] == theirs

def test_completion_labels_equal_trl(shared, chat_model, tmp_path):
    "Texts without a template: a prompt that ends at a word's end, a completion that begins with a space"
    rows = [dict(prompt=r['prompt'].strip(), completion=f" {r['answer']}") for r in
            load(shared/'datasets'/'gsm8k_train.jsonl', mapping=dict(prompt='question')).select(range(100))]
    theirs = prepared_by_trl(*chat_model, rows, tmp_path)
    ours = encode_dataset(chat_model[0], rows)
    assert [(r['input_ids'], r['labels']) for r in ours] == theirs

def test_a_mask_that_is_shifted_differs_from_trl(chat_model, tmp_path):
    "The broken twin of the comparison"
    rows = [dict(messages=[dict(role='user', content='Hi'), dict(role='assistant', content='Hello')])]
    (ids,labels), = prepared_by_trl(*chat_model, rows, tmp_path, assistant_only_loss=True)
    ours = encode_dataset(chat_model[0], rows)[0]
    assert (ours['input_ids'], ours['labels'][1:]+[-100]) != (ids, labels)
