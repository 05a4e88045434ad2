"Pre-train ftkit's base model on nothing but `ftkit.tasks.raw_text`: about 35 minutes on two cores"
import random, time
import torch
from fastcore.script import call_parse
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from ftkit.tasks import raw_text
from ftkit.tiny import llama, train_tokenizer

def batches(tok, seed, rows, length):
    "Documents one after another, each ended by <|endoftext|>, cut into (rows, length) blocks"
    rng,ids = random.Random(seed),[]
    while True:
        for doc in tok([raw_text(rng) for _ in range(500)]).input_ids: ids += doc + [tok.eos_token_id]
        while len(ids) >= rows*length:
            yield torch.tensor(ids[:rows*length]).view(rows, length)
            del ids[:rows*length]

def lm_loss(model, ids):
    logits = model(input_ids=ids, use_cache=False).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

def optimizers(model, steps):
    "Muon for matrices inside the blocks, AdamW for embeddings and norms; 50 steps up, down over the last 40%"
    inside = [p for n,p in model.named_parameters() if p.ndim == 2 and 'embed' not in n]
    rest = [p for n,p in model.named_parameters() if p.ndim < 2 or 'embed' in n]
    opts = [torch.optim.Muon(inside, lr=.01, weight_decay=.01),
            torch.optim.AdamW(rest, lr=3e-3, betas=(.9, .98), weight_decay=0)]
    schedule = lambda step: min(1, (step+1)/50, (steps-step)/(.4*steps))
    return opts, [LambdaLR(o, schedule) for o in opts]

@call_parse
def main(out:str,               # folder for model and tokenizer
         tokens:int=18_000_000, # how many to train on
         seed:int=0,            # of the text and the weights
         rows:int=16,           # sequences per step
         length:int=256,        # tokens per sequence
        ):
    "Pre-train the base model that ships inside ftkit"
    torch.manual_seed(seed)
    rng = random.Random(seed+1)
    tok = train_tokenizer((raw_text(rng) for _ in range(20_000)), 1024)
    model = llama(1024, hidden=128, layers=6, intermediate=384, heads=4, max_position_embeddings=1024)
    steps = tokens//(rows*length)
    opts,schedules = optimizers(model, steps)
    start,data = time.time(),batches(tok, seed, rows, length)
    for step in range(steps):
        loss = lm_loss(model, next(data))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        for o,s in zip(opts, schedules): o.step(); s.step(); o.zero_grad()
        if step % 100 == 0 or step == steps-1:
            speed = (step+1)*rows*length/(time.time()-start)
            print(f'step {step} of {steps}, loss {loss:.3f}, {speed:,.0f} tokens/s', flush=True)
        if step % 1000 == 999: model.save_pretrained(out); tok.save_pretrained(out)
    model.save_pretrained(out)
    tok.save_pretrained(out)
    with torch.no_grad(): print(f'loss on unseen text: {lm_loss(model, next(batches(tok, seed+2, 64, length))):.3f}')
