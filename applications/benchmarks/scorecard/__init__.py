"""The scorecard of the field: exact anchors and trap programs through every library, with one judge.

    python -m applications.benchmarks.scorecard [--peers pyro,storchastic] [--problems bernoulli-.3,branch]
        [--environments DIR] [--seconds 5] [--out runs/scorecard]

Every library works in an environment of its own (``environments.py``) and is run by that environment's Python, the
checkout being the working directory. ``problems.py`` says what is asked and knows the exact answers; a worker in
``peers/`` asks its library and writes down what came back; ``judge.py`` judges everybody alike; ``page.py`` writes
``docs/scorecard.md`` and its parts.

**How to write a worker.** ``peers/<name>.py`` imports numpy, its own library, ``problems`` and ``protocol``, nothing
else (neither torch nor scorefn unless that is its library). It makes one ``Peer`` and registers *rows*; a row is one
documented way of using the library on one problem::

    from applications.benchmarks.scorecard import problems
    from applications.benchmarks.scorecard.protocol import Answer, Peer

    peer = Peer("numpyro", packages=("numpyro", "jax", "numpy"))


    @peer.row("elbo", "Trace_ELBO", link="https://num.pyro.ai/en/stable/svi.html")
    def trace_elbo(problem: problems.Problem) -> Answer:
        import numpyro

        ...
        return Answer(
            one=lambda: gradient_of_one_estimate,
            many=lambda count: gradients_of_count_estimates,
        )


    peer.lacks("iw-5", "has no multi-sample bound for discrete guides")

    if __name__ == "__main__":
        peer.main()

- ``peer.row(problems, estimator, *, link, reading="", choice="", note="", evaluations=None)``: ``problems`` is one
  name of ``problems.PROBLEMS`` or several (a tuple: the function is called with each). ``estimator`` is the library's
  own name of the method. ``reading``: where the documentation can be read in two ways, each reading is a row, and this
  says which. ``choice``: where a difference from the exact answer is a documented choice (normalised advantages,
  another objective), this names it, and the page then calls it a choice, not a fault. ``evaluations``: of f, per
  estimate.
- The function builds everything that is built once and returns an ``Answer``:
  ``one() -> array [P]``: one independent estimate of what ``problem.quantity`` names, in the parameters and the *sign*
  of the problem (a library that minimises: turn its sign). It is what is timed, so it holds what a user's step holds
  (draw, loss, backward) and no more.
  ``many(count) -> array [count, P]``: the same estimates, several at once, where the library can (a batch of
  independent replicas, vmap). Optional: without it ``one`` is called again and again. It must not change the estimator:
  a running baseline, or a baseline over the batch, cannot be replicated so.
  ``exact=True`` for something without randomness: it is then asked once.
- The source of the function is stored and is the documented usage that the page points to: write what the library's
  documentation writes. Set up nothing at import time that could crash: import the library inside the function, or at
  the top of the file if the import itself is sure.
- An exception, in building or in running, is data: it is recorded with its type, its message, the last frame, and
  whether the library raised it on purpose (then the row of a trap says "refuses") or stumbled ("crashes").
- ``peer.main()`` parses ``--problems --seconds --repeats --seed --out`` and writes ``OUT/<name>.npz`` (arrays ``g0``,
  ``g1``, ...: ``[n, P]``) and ``OUT/<name>.json``: versions and one record per row (see ``protocol.Record``). Every row
  is given ``seconds`` of CPU time or ``repeats`` estimates, whichever ends first; with ``--problems``, rows of other
  problems that lie in OUT stay, if the versions are the same.
- numpy's global generator is seeded before each row, and ``Peer(seed_all=...)``, a callable of one integer, seeds the
  library's own (``torch.manual_seed``; for JAX keep a key of your own, made from ``peer.seed``).
- Time is CPU time per estimate, divided by the CPU time of a fixed numpy yardstick in the same process, so that
  rows from different environments and busy moments can be compared.

Register the worker in ``environments.PEERS`` (name, requirements). Files of this package stay below 400 lines.
"""
