"""The fine-tuning guide you can run

Modules:

- `ftkit.answers`: Pairs and labelled answers: encoded, cut, and laid so that the prompt is computed once
- `ftkit.audit`: Ways to ruin a data set without an error message, each found by name
- `ftkit.chat`: From messages to the exact text a model sees, and who wrote which part of it
- `ftkit.choose`: Prompt, search, pre-train or tune? By which method, with which adapter, on how much data, from which model? Each answer with its reason
- `ftkit.cli`: `ftkit sft` tunes a model on your file, `ftkit chat` talks to it, `ftkit merge` makes one model of it, `ftkit memory` says what it needs
- `ftkit.core`: The machine, its settings, and errors that say what to do
- `ftkit.dpo`: Learn from pairs of answers without a reward model, in fifteen ways
- `ftkit.evaluate`: How many held-out questions are answered right, and which of two answers a model prefers
- `ftkit.explore`: Pictures of rules and formulae before anything is trained: advice, batches, schedules, packing, DPO, GRPO, rewards
- `ftkit.formats`: From the rows people have to the few kinds of rows that a model learns from
- `ftkit.generate`: Ask a model, one question or a thousand
- `ftkit.grpo`: Several answers to one question are each other's yardstick: advantages, ratios and losses of GRPO and its kin
- `ftkit.hparams`: Where to start, what is out of range, and who says so
- `ftkit.kto`: Learn from answers that were liked or not, one by one, without pairs
- `ftkit.layers`: The layers of a language model as transformers runs them, on a tape that counts bytes
- `ftkit.lengths`: How long the rows are, where to cut, and what a cut costs
- `ftkit.live`: Watch a run and stop it, read what it sampled, go through rows by hand, and talk to two models at once
- `ftkit.logps`: How likely the model finds each token it should have written, without the matrix that does not fit
- `ftkit.lora`: A small product beside a frozen matrix
- `ftkit.mask`: Token ids, and which of them are trained, exact to the character
- `ftkit.memory`: What a training step takes, from a config alone, and on which GPU it goes
- `ftkit.meter`: Every allocation that PyTorch makes, written down, and what its allocator on a GPU would make of it
- `ftkit.mix`: Several sources in the shares you want, and test rows that were not seen in training
- `ftkit.models`: Load a model ready to be tuned, save the result whole, load it again to the same logits
- `ftkit.nf4`: Four bits for a weight, and QLoRA on top
- `ftkit.objectives`: What a row becomes, how rows become a batch, and what the batch costs
- `ftkit.orpo`: ORPO, SimPO and CPO: learn from pairs with one model in memory
- `ftkit.pack`: Full rows instead of padding, and documents that cannot see each other
- `ftkit.ppo`: The losses of PPO: a policy that may not move far, and a critic that says what was to be expected
- `ftkit.reference`: What the model was before training, three ways
- `ftkit.reward`: A score for answers, learned from which of two people preferred
- `ftkit.rewards`: Functions that say how good an answer is, and a bench to try them on before anything is trained on them
- `ftkit.rl`: The whole loop on one screen: prompts, rollouts, rewards, advantages, log-probabilities, loss, step, log
- `ftkit.rollout`: Several answers to each prompt, token ids in and out, with what the engine thought of every token it drew
- `ftkit.sandbox`: Run what a model wrote: it can compute, print, and write into an empty folder, and nothing else
- `ftkit.sft`: The loss of learning from examples: make the given answer likely
- `ftkit.show`: What a model is trained on, how its loss falls, and what it answers, to look at
- `ftkit.simulate`: One real training step without weights, numbers or a GPU: every allocation it would make, and the memory that takes
- `ftkit.tape`: What autograd keeps for the way back, and what the way back takes, on tensors that are only a shape and a width
- `ftkit.tasks`: Questions a program can mark: eight families of them, and the raw text that teaches their answers
- `ftkit.tiny`: A random model in milliseconds for tests, and a trained one inside the package
- `ftkit.train`: One trainer for every objective, which goes on from its last checkpoint after a kill
- `ftkit.view`: Something to look at that is also text, a table, and axes to draw on
- `ftkit.widgets`: Thin controls over the views: type, turn, and see
- `ftkit.with_trl`: The same rows and options, handed to TRL's trainers"""

__version__ = "0.1.0"
