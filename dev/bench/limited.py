"""Commands that end when their time is over, with all that they have started."""
import os
import signal
import subprocess
import time


def processes_of(session):
    """Numbers of the processes of a session: of every group in it, as scripts make for what they start."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat") as file:
                    fields = file.read().rpartition(")")[2].split()  # behind the name, which may hold anything
            except OSError:
                continue  # it has ended
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(name))
    return found


def end_session(session):
    """Not for ever: a process that waits for a driver cannot be ended."""
    for _ in range(50):
        left = processes_of(session)  # one may start another meanwhile
        if not left:
            return
        for process in left:
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                pass
        time.sleep(0.1)


def run_limited(command, limit, env=None):
    """Status and output of a command; status None: after `limit` seconds it was ended with all that it had started."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env,
                               start_new_session=True)
    try:
        stdout, stderr = process.communicate(timeout=limit)
        return process.returncode, stdout, stderr
    except subprocess.TimeoutExpired:
        end_session(process.pid)
        try:
            return None, *process.communicate(timeout=5)
        except subprocess.TimeoutExpired:  # whatever holds the pipes is no process of this session, or cannot be ended
            return None, "", "could not be ended"
    except BaseException:
        end_session(process.pid)
        raise
