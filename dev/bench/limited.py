"""Commands that end when their time is over, with all that they have started."""
import os
import signal
import subprocess
import time


def processes_of(leader):
    """Numbers of the processes under a leader (setsid): of every group of them, as scripts make for what they start."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat") as file:
                    fields = file.read().rpartition(")")[2].split()  # behind the name, which may hold anything
            except OSError:
                continue  # it has ended
            if int(fields[3]) == leader and fields[0] != "Z":
                found.append(int(name))
    return found


def end_all_of(leader):
    """Not for ever: a process that waits for a driver cannot be ended."""
    for _ in range(50):
        left = processes_of(leader)  # one may start another meanwhile
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
        end_all_of(process.pid)
        try:
            return None, *process.communicate(timeout=5)
        except subprocess.TimeoutExpired:  # what holds the pipes has left its leader, or cannot be ended
            return None, "", "could not be ended"
    except BaseException:
        end_all_of(process.pid)
        raise
