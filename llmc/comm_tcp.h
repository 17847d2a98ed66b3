// comm_tcp.h: ranks that find each other without MPI, started by srun, ssh, a shell loop or anything else. The launcher
// sets, for every process:
//   LLMC_RENDEZVOUS   HOST:PORT, where rank 0 listens; or a file that all ranks see and that does not exist yet, into
//                     which rank 0 writes where it listens
//   LLMC_WORLD_SIZE   number of ranks   (default: SLURM_NTASKS)
//   LLMC_RANK         this one's        (default: SLURM_PROCID)
// Then every two ranks have a connection. Like MPI and NCCL it trusts its network: run it inside a cluster.
// A closed connection or a reset one means a dead rank, so death is noticed at once, and hanging after the time-out.
#pragma once
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>

#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <deque>
#include <fcntl.h>
#include <fstream>
#include <thread>
#include <utility>

#include "comm.h"

// ---- sockets -----------------------------------------------------------------------------------
class Socket {
  public:
    Socket() = default;
    explicit Socket(int descriptor) : descriptor_(descriptor) {}
    Socket(Socket&& other) noexcept : descriptor_(std::exchange(other.descriptor_, -1)) {}
    Socket& operator=(Socket&& other) noexcept {
        std::swap(descriptor_, other.descriptor_);
        return *this;
    }
    ~Socket() {
        if (descriptor_ >= 0) {
            close(descriptor_);
        }
    }
    operator int() const { return descriptor_; }

  private:
    int descriptor_ = -1;
};

// Where a rank listens: its machine's name, or the address that it has for another rank.
struct TcpAddress {
    std::string host;
    uint16_t port = 0;
};

namespace tcp {
using Clock = std::chrono::steady_clock;

inline double seconds_since(Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
}

// Listens on all interfaces; port 0: any free one. `port` becomes the port it listens on.
inline Socket listen_on(uint16_t& port) {
    Socket listener(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    CHECK(listener >= 0, "cannot make a socket: %s", std::strerror(errno));
    const int on = 1;
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_ANY);
    address.sin_port = htons(port);
    CHECK(
        bind(listener, reinterpret_cast<sockaddr*>(&address), sizeof address) == 0 && listen(listener, SOMAXCONN) == 0,
        "cannot listen on port %d: %s", port, std::strerror(errno));
    socklen_t size = sizeof address;
    CHECK(getsockname(listener, reinterpret_cast<sockaddr*>(&address), &size) == 0, "getsockname: %s",
          std::strerror(errno));
    port = ntohs(address.sin_port);
    return listener;
}

// One try; an invalid socket when nobody listens there (yet).
inline Socket try_connect(const TcpAddress& to) {
    // A machine, a container above all, need not know its own name; and another one may have the same.
    if (to.host == host_name()) {
        Socket connection = try_connect({"127.0.0.1", to.port});
        if (connection >= 0) {
            return connection;
        }
    }
    addrinfo hints{}, *found = nullptr;
    hints.ai_family = AF_INET;
    hints.ai_socktype = SOCK_STREAM;
    if (getaddrinfo(to.host.c_str(), std::to_string(to.port).c_str(), &hints, &found) != 0) {
        return Socket();
    }
    Socket connection(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    const bool connected = connection >= 0 && connect(connection, found->ai_addr, found->ai_addrlen) == 0;
    freeaddrinfo(found);
    sockaddr_in own{}, peer{};  // with nobody there, a free port of this machine may be taken that is the one asked for
    socklen_t own_size = sizeof own, peer_size = sizeof peer;
    const bool to_itself = connected && getsockname(connection, reinterpret_cast<sockaddr*>(&own), &own_size) == 0 &&
                           getpeername(connection, reinterpret_cast<sockaddr*>(&peer), &peer_size) == 0 &&
                           own.sin_port == peer.sin_port && own.sin_addr.s_addr == peer.sin_addr.s_addr;
    return connected && !to_itself ? std::move(connection) : Socket();
}

// The other end of a connection, as "10.0.0.7".
inline std::string peer_host(const Socket& connection) {
    sockaddr_in address{};
    socklen_t size = sizeof address;
    char host[NI_MAXHOST] = {};
    CHECK(getpeername(connection, reinterpret_cast<sockaddr*>(&address), &size) == 0 &&
              getnameinfo(reinterpret_cast<sockaddr*>(&address), size, host, sizeof host, nullptr, 0, NI_NUMERICHOST) ==
                  0,
          "cannot tell who connected: %s", std::strerror(errno));
    return host;
}

// "node0:29500" or "/shared/job17": where rank 0 listens, or the file that will say.
inline bool is_file_rendezvous(const std::string& rendezvous) { return rendezvous.find('/') != std::string::npos; }
inline TcpAddress parse_address(const std::string& text, const char* what) {
    const size_t colon = text.rfind(':');
    char* end = nullptr;
    const long port = colon == std::string::npos ? 0 : std::strtol(text.c_str() + colon + 1, &end, 10);
    CHECK(colon != std::string::npos && colon > 0 && port > 0 && port < 65536 && *end == '\0',
          "%s '%s': must be HOST:PORT with a port from 1 to 65535, or the path of a file that all ranks see", what,
          text.c_str());
    return {text.substr(0, colon), (uint16_t)port};
}
}  // namespace tcp

// ---- the transport -----------------------------------------------------------------------------
class TcpComm : public HostComm {
  public:
    TcpComm(int rank, int size, const std::string& rendezvous, double timeout_seconds)
        : HostComm(rank, size, timeout_seconds), connections_(size) {
        meet(rendezvous);
        for (Socket& connection : connections_) {
            if (connection >= 0) {
                const int on = 1;
                CHECK(setsockopt(connection, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on) == 0 &&
                          fcntl(connection, F_SETFL, O_NONBLOCK) == 0,
                      "cannot set up a connection: %s", std::strerror(errno));
            }
        }
        exchange_hosts(*this);
    }

    void exchange(const std::vector<HostSend>& sends, const std::vector<HostReceive>& receives,
                  const std::string& operation) override {
        std::vector<Outgoing> outgoing(size());
        std::vector<Incoming> incoming(size());
        for (const HostSend& s : sends) {
            if (s.peer != rank()) {
                outgoing[s.peer].messages.push_back({s.num_bytes, static_cast<const char*>(s.data)});
            }
        }
        for (const HostReceive& r : receives) {
            if (r.peer != rank()) {
                incoming[r.peer].messages.push_back({r.num_bytes, static_cast<char*>(r.data)});
            }
        }
        exchange_with_self(sends, receives, operation);
        tcp::Clock::time_point progress = tcp::Clock::now();
        std::vector<pollfd> waiting;
        std::vector<int> peers;
        while (true) {
            waiting.clear();
            peers.clear();
            for (int peer = 0; peer < size(); ++peer) {
                const short events =
                    (short)((outgoing[peer].done() ? 0 : POLLOUT) | (incoming[peer].done() ? 0 : POLLIN));
                if (events != 0) {
                    waiting.push_back({connections_[peer], events, 0});
                    peers.push_back(peer);
                }
            }
            if (waiting.empty()) {
                return;
            }
            const int ready = poll(waiting.data(), waiting.size(), 100);
            CHECK(ready >= 0 || errno == EINTR, "%s: poll: %s", identity().where(operation).c_str(),
                  std::strerror(errno));
            for (size_t i = 0; i < waiting.size(); ++i) {
                if (waiting[i].revents != 0) {  // an error shows in whichever of the two is tried
                    receive_some(incoming[peers[i]], peers[i], operation);
                    send_some(outgoing[peers[i]], peers[i], operation);
                    progress = tcp::Clock::now();
                }
            }
            CHECK(tcp::seconds_since(progress) < identity().timeout_seconds,
                  "%s: nothing from rank %d (%s) for %g s (--comm_timeout): it hangs or is gone",
                  identity().where(operation).c_str(), peers[0], identity().host_of(peers[0]).c_str(),
                  identity().timeout_seconds);
        }
    }

    // Nobody closes a connection that another rank still reads from.
    void finish() override { HostGroup(*this).barrier("end of the run"); }

  private:
    // A message on the wire: its length in 8 bytes, then its bytes. Where a rank is in the first one that is not done;
    // `done_bytes` counts the length too.
    template <class Byte>
    struct Queue {
        struct Message {
            uint64_t num_bytes;
            Byte* data;
        };
        std::deque<Message> messages;
        uint64_t done_bytes = 0;
        bool done() const { return messages.empty(); }
        void advance(uint64_t num_bytes) {
            done_bytes += num_bytes;
            if (done_bytes == sizeof(uint64_t) + messages.front().num_bytes) {
                messages.pop_front();
                done_bytes = 0;
            }
        }
    };
    using Outgoing = Queue<const char>;
    struct Incoming : Queue<char> {
        uint64_t announced = 0;  // by the message's head
    };

    [[noreturn]] void fail_peer(int peer, const std::string& operation, const char* reason) const {
        fail("%s: rank %d (%s) is gone: %s", identity().where(operation).c_str(), peer,
             identity().host_of(peer).c_str(), reason);
    }

    void send_some(Outgoing& queue, int peer, const std::string& operation) {
        while (!queue.done()) {
            const auto& message = queue.messages.front();
            const bool in_head = queue.done_bytes < sizeof(uint64_t);
            const char* const from = in_head ? reinterpret_cast<const char*>(&message.num_bytes) + queue.done_bytes
                                             : message.data + (queue.done_bytes - sizeof(uint64_t));
            const uint64_t end = sizeof(uint64_t) + (in_head ? 0 : message.num_bytes);
            const ssize_t sent = send(connections_[peer], from, end - queue.done_bytes, MSG_NOSIGNAL);
            if (sent < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR)) {
                return;
            }
            if (sent < 0) {
                fail_peer(peer, operation, std::strerror(errno));
            }
            queue.advance(sent);
        }
    }

    void receive_some(Incoming& queue, int peer, const std::string& operation) {
        while (!queue.done()) {
            auto& message = queue.messages.front();
            const bool in_head = queue.done_bytes < sizeof(uint64_t);
            char* const to = in_head ? reinterpret_cast<char*>(&queue.announced) + queue.done_bytes
                                     : message.data + (queue.done_bytes - sizeof(uint64_t));
            const uint64_t end = sizeof(uint64_t) + (in_head ? 0 : message.num_bytes);
            const ssize_t received = recv(connections_[peer], to, end - queue.done_bytes, 0);
            if (received < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR)) {
                return;
            }
            if (received <= 0) {
                fail_peer(peer, operation, received == 0 ? "it closed the connection" : std::strerror(errno));
            }
            if (in_head && queue.done_bytes + received == sizeof(uint64_t)) {
                CHECK(queue.announced == message.num_bytes, "%s: rank %d (%s) sends %llu bytes where %llu are expected",
                      identity().where(operation).c_str(), peer, identity().host_of(peer).c_str(),
                      (unsigned long long)queue.announced, (unsigned long long)message.num_bytes);
            }
            queue.advance(received);
        }
    }

    // ---- finding each other

    // What a rank says when it connects.
    struct Hello {
        uint64_t magic = 0x6c6c6d632d746370;  // "llmc-tcp"
        int32_t size = 0, rank = 0;
        uint32_t port = 0;                // where it listens
        char host[INET_ADDRSTRLEN] = {};  // its address for rank 0, which enters it; empty: that of rank 0 itself
    };

    // Blocking, within what is left of the time-out.
    void send_all(const Socket& to, const void* data, size_t num_bytes) const {
        const char* from = static_cast<const char*>(data);
        while (num_bytes > 0) {
            const ssize_t sent = send(to, from, num_bytes, MSG_NOSIGNAL);
            CHECK(sent > 0, "%s: a rank is gone: %s", identity().where("rendezvous").c_str(), std::strerror(errno));
            from += sent, num_bytes -= sent;
        }
    }
    // Whether all of it came.
    static bool receive_all(const Socket& from, void* data, size_t num_bytes, double seconds) {
        char* to = static_cast<char*>(data);
        const tcp::Clock::time_point start = tcp::Clock::now();
        while (num_bytes > 0) {
            pollfd ready{from, POLLIN, 0};
            if (tcp::seconds_since(start) > seconds || poll(&ready, 1, 100) < 0) {
                return false;
            }
            if (ready.revents != 0) {
                const ssize_t received = recv(from, to, num_bytes, 0);
                if (received <= 0) {
                    return false;
                }
                to += received, num_bytes -= received;
            }
        }
        return true;
    }

    double seconds_left() const { return identity().timeout_seconds - tcp::seconds_since(start_); }
    Hello hello(uint16_t port) const {
        Hello h;
        h.size = size(), h.rank = rank(), h.port = port;
        return h;
    }

    // Takes connections until every rank of [begin, size) has come. Whoever is not one of us is turned away.
    std::vector<Hello> accept_ranks(const Socket& listener, int begin, const std::string& rendezvous) {
        std::vector<Hello> hellos(size());
        for (int missing = size() - begin; missing > 0;) {
            std::string absent;
            for (int i = begin; i < size(); ++i) {
                absent += i != rank() && connections_[i] < 0 ? " " + std::to_string(i) : "";
            }
            CHECK(seconds_left() > 0.0, "%s at %s: did not come within %g s (--comm_timeout): rank%s",
                  identity().where("rendezvous").c_str(), rendezvous.c_str(), identity().timeout_seconds,
                  absent.c_str());
            pollfd ready{listener, POLLIN, 0};
            if (poll(&ready, 1, 100) <= 0) {
                continue;
            }
            Socket connection(accept4(listener, nullptr, nullptr, SOCK_CLOEXEC));
            Hello h;
            const Hello own;
            if (connection < 0 || !receive_all(connection, &h, sizeof h, std::min(5.0, seconds_left())) ||
                h.magic != own.magic) {
                continue;
            }
            CHECK(h.size == size(), "rendezvous at %s: rank %d expects %d ranks, rank %d expects %d",
                  rendezvous.c_str(), rank(), size(), h.rank, h.size);
            CHECK(h.rank >= begin && h.rank < size() && connections_[h.rank] < 0,
                  "rendezvous at %s: two processes say that they are rank %d", rendezvous.c_str(), h.rank);
            const std::string host = tcp::peer_host(connection);
            std::strcpy(h.host, host.rfind("127.", 0) == 0 ? "" : host.c_str());
            hellos[h.rank] = h;
            connections_[h.rank] = std::move(connection);
            --missing;
        }
        return hellos;
    }

    // Connected within the time-out; `find` gives the address, or an empty host when it is not known yet.
    template <class Find>
    Socket connect_within_timeout(Find find, const std::string& whom) {
        while (true) {
            const TcpAddress address = find();
            Socket connection = address.host.empty() ? Socket() : tcp::try_connect(address);
            if (connection >= 0) {
                return connection;
            }
            CHECK(seconds_left() > 0.0, "%s: %s does not answer within %g s (--comm_timeout)",
                  identity().where("rendezvous").c_str(), whom.c_str(), identity().timeout_seconds);
            std::this_thread::sleep_for(std::chrono::milliseconds(20));
        }
    }

    // Rank 0 is where all others come first; it tells them of each other, and of two ranks the higher connects.
    void meet(const std::string& rendezvous) {
        if (size() == 1) {
            return;
        }
        const bool by_file = tcp::is_file_rendezvous(rendezvous);
        const TcpAddress given = by_file ? TcpAddress{} : tcp::parse_address(rendezvous, "LLMC_RENDEZVOUS");
        uint16_t port = rank() == 0 ? given.port : 0;
        const Socket listener = tcp::listen_on(port);
        std::vector<Hello> hellos;
        if (rank() == 0) {
            if (by_file) {
                write_rendezvous_file(rendezvous, port);
            }
            hellos = accept_ranks(listener, 1, rendezvous);
            for (int i = 1; i < size(); ++i) {
                send_all(connections_[i], hellos.data(), hellos.size() * sizeof(Hello));
            }
            if (by_file) {
                unlink(rendezvous.c_str());
            }
            return;
        }
        connections_[0] = connect_within_timeout([&] { return by_file ? read_rendezvous_file(rendezvous) : given; },
                                                 "rank 0 at " + rendezvous);
        const Hello own = hello(port);
        send_all(connections_[0], &own, sizeof own);
        hellos.resize(size());
        CHECK(receive_all(connections_[0], hellos.data(), hellos.size() * sizeof(Hello), seconds_left()),
              "%s at %s: rank 0 has ended, or the others did not come within %g s (--comm_timeout)",
              identity().where("rendezvous").c_str(), rendezvous.c_str(), identity().timeout_seconds);
        // By addresses: names of machines need not differ, nor be known to others. Those who share rank 0's are where
        // this rank has found rank 0.
        const std::string first_host = tcp::peer_host(connections_[0]);
        for (int i = 1; i < rank(); ++i) {
            const std::string host = hellos[i].host;
            const TcpAddress address{host.empty() ? first_host : host, (uint16_t)hellos[i].port};
            connections_[i] =
                connect_within_timeout([&] { return address; }, "rank " + std::to_string(i) + " at " + address.host);
            send_all(connections_[i], &own, sizeof own);
        }
        accept_ranks(listener, rank() + 1, rendezvous);
    }

    // Complete under another name first: nobody reads half a line.
    static void write_rendezvous_file(const std::string& path, uint16_t port) {
        const std::string temporary = path + ".new";
        std::ofstream file(temporary, std::ios::trunc);
        file << host_name() << ":" << port << "\n";
        file.close();
        CHECK(file.good() && std::rename(temporary.c_str(), path.c_str()) == 0, "LLMC_RENDEZVOUS %s: cannot write: %s",
              path.c_str(), std::strerror(errno));
    }
    static TcpAddress read_rendezvous_file(const std::string& path) {
        std::ifstream file(path);
        std::string line;
        return std::getline(file, line) ? tcp::parse_address(line, path.c_str()) : TcpAddress{};
    }

    tcp::Clock::time_point start_ = tcp::Clock::now();
    std::vector<Socket> connections_;  // by rank; this one's own stays empty
};
