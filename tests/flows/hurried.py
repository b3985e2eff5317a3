"""`saap` that tries what failed again at once.

python hurried.py run CONFIG …
"""

from tasks import running

running.RETRY_SECONDS = [0.1] * len(running.RETRY_SECONDS)

if __name__ == "__main__":
    from flows.cli import main

    main()
