/* The load client of bench.py: many WebSocket clients in one thread, with epoll.
 *
 *   loadclient PORT PATH COUNT [--deflate] [--send TEXT] [--repeat N] [--answers N]
 *              [--engineio] [--stuck] [--spin]
 *
 * It opens COUNT connections to 127.0.0.1, on each sends TEXT N times (every '#' in it becomes a
 * running number), waits for that many answers, and says {"ready": ...}. Then it obeys lines on
 * standard input and answers each with lines of JSON:
 *
 *   expect EVENTS MILLISECONDS   {"armed": 1} at once; a report when every client has EVENTS
 *                                events, or the time is over
 *   stuck                        how the connection that was never read has ended
 *   exit
 *
 * It has to be much faster than any server, so it parses no JSON: the event's number is looked
 * for where it stood in the frame before. Every event on every connection must carry the number
 * after the one before it. With --spin it does not sleep while it expects events: a server whose
 * calls are a little further apart would else find it asleep each time, and waking it, which on a
 * virtual machine takes as long as the call itself, would count as the server's. All times are CLOCK_MONOTONIC, which is Python's time.monotonic_ns().
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>
#ifdef WITH_ZLIB
#include <zlib.h>
#endif

enum { LIFETIME_S = 600, SCRATCH = 1 << 20, NO_SEQ = -1 };
enum { TEXT = 1, BINARY = 2, CLOSE = 8, PING = 9, PONG = 10 };

typedef struct {
    int fd, open, stuck, close_code, deflated;
    unsigned char *rest; /* the beginning of a frame whose end has not arrived */
    size_t rest_len, rest_size;
    long frames, answers; /* events since the last `expect`; all other messages, ever */
    int64_t last_seq, latency_ns;
#ifdef WITH_ZLIB
    z_stream inflater;
#endif
} Client;

static Client *clients;
static int count, engineio, poller;
static unsigned char scratch[SCRATCH], plain[SCRATCH];

/* The run that is being counted. */
static long expected, total, complete, order_errors, bad_frames, unseen;
static size_t smallest, largest;
static int64_t first_ns, last_ns, wire_bytes, cpu_at_first, spun_ns;

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

static int64_t cpu_ns(void) {
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    return (u.ru_utime.tv_sec + u.ru_stime.tv_sec) * INT64_C(1000000000) +
           (u.ru_utime.tv_usec + u.ru_stime.tv_usec) * INT64_C(1000);
}

static void say(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vprintf(format, arguments);
    va_end(arguments);
    putchar('\n');
    fflush(stdout);
}

static void die(const char *what) {
    fprintf(stderr, "loadclient: %s: %s\n", what, errno ? strerror(errno) : "unexpected");
    exit(1);
}

/* A client must mask what it sends; a key of four zero bytes is allowed and changes nothing. */
static void send_frame(Client *c, int opcode, const void *payload, size_t length) {
    unsigned char head[8] = {0x80 | opcode, 0x80 | length}, frame[8 + 4096];
    size_t n = 6;
    if (length > 4096) die("message too long to send");
    if (length > 125) {
        head[1] = 0x80 | 126;
        head[2] = length >> 8;
        head[3] = length & 0xff;
        n = 8;
    }
    memcpy(frame, head, n);
    memcpy(frame + n, payload, length);
    (void)!send(c->fd, frame, n + length, MSG_NOSIGNAL);
}

static void ended(Client *c) {
    if (!c->open) return;
    c->open = 0;
    epoll_ctl(poller, EPOLL_CTL_DEL, c->fd, NULL);
}

/* The number after `name` in a message, or NO_SEQ. *hint is where it stood the last time. */
static int64_t number_after(const char *name, size_t *hint, const unsigned char *text, size_t n) {
    size_t length = strlen(name);
    const unsigned char *at = text + *hint, *end = text + n;
    if (*hint + length > n || memcmp(at, name, length)) {
        at = memmem(text, n, name, length);
        if (!at) return NO_SEQ;
        *hint = at - text;
    }
    at += length;
    while (at < end && *at == ' ') at++;
    int64_t value = 0;
    while (at < end && *at >= '0' && *at <= '9') value = value * 10 + (*at++ - '0');
    return value;
}

static void message(Client *c, unsigned char *text, size_t n, int compressed, int64_t now) {
    static size_t seq_hint, sent_hint;
    int64_t seq;
    if (compressed) {
#ifdef WITH_ZLIB
        /* RFC 7692: the sender leaves out the last four bytes of a flushed deflate block. */
        static unsigned char tail[] = {0, 0, 0xff, 0xff};
        z_stream *z = &c->inflater;
        z->next_out = plain, z->avail_out = sizeof plain;
        z->next_in = text, z->avail_in = n;
        if (inflate(z, Z_SYNC_FLUSH) < 0) bad_frames++;
        z->next_in = tail, z->avail_in = sizeof tail;
        if (inflate(z, Z_SYNC_FLUSH) < 0) bad_frames++;
        text = plain, n = sizeof plain - z->avail_out;
#else
        unseen++; /* cannot be looked into: once all answers are in, it counts as an event */
#endif
    }
    if (engineio && n == 1 && *text == '2') {
        send_frame(c, TEXT, "3", 1);
        return;
    }
#ifndef WITH_ZLIB
    if (compressed)
        seq = expected ? c->last_seq + 1 : NO_SEQ;
    else
#endif
        seq = number_after("\"seq\":", &seq_hint, text, n);
    if (seq == NO_SEQ) {
        c->answers++;
        return;
    }
    if (c->last_seq != NO_SEQ && seq != c->last_seq + 1) order_errors++;
    c->last_seq = seq;
    if (c->stuck) return;
    if (!total++) {
        first_ns = now;
        cpu_at_first = cpu_ns(), spun_ns = 0;
    }
    last_ns = now;
    if (n < smallest) smallest = n;
    if (n > largest) largest = n;
    if (++c->frames == expected) complete++;
    if (expected == 1) c->latency_ns = now - number_after("\"sent_ns\":", &sent_hint, text, n);
}

/* Handles the whole frames in a buffer and keeps what is left over. */
static void take(Client *c, unsigned char *data, size_t n, int64_t now) {
    size_t at = 0;
    while (n - at >= 2) {
        unsigned char *head = data + at;
        size_t length = head[1] & 0x7f, skip = 2;
        int opcode = head[0] & 0x0f;
        if (length >= 126) {
            size_t extra = length == 126 ? 2 : 8;
            if (n - at < 2 + extra) break;
            length = 0;
            for (size_t i = 0; i < extra; i++) length = length << 8 | head[2 + i];
            skip += extra;
        }
        if (length > SCRATCH / 2 || head[1] & 0x80 || !(head[0] & 0x80) || head[0] & 0x30) {
            bad_frames++; /* masked, in fragments, or not a frame at all: no way to go on */
            ended(c);
            return;
        }
        if (n - at < skip + length) break;
        unsigned char *payload = head + skip;
        if (opcode == TEXT || opcode == BINARY)
            message(c, payload, length, head[0] & 0x40, now);
        else if (opcode == PING)
            send_frame(c, PONG, payload, length);
        else if (opcode == CLOSE) {
            c->close_code = length >= 2 ? payload[0] << 8 | payload[1] : 1005;
            ended(c);
            return;
        } else if (opcode != PONG)
            bad_frames++;
        at += skip + length;
    }
    c->rest_len = n - at;
    if (c->rest_len > c->rest_size) {
        c->rest_size = c->rest_len * 2;
        c->rest = realloc(c->rest, c->rest_size);
    }
    if (c->rest_len) memcpy(c->rest, data + at, c->rest_len);
}

/* A server that leaves Nagle's algorithm on would have each connection wait 40 ms for our ACK. */
static void acknowledge_at_once(Client *c) {
    int on = 1;
    setsockopt(c->fd, IPPROTO_TCP, TCP_QUICKACK, &on, sizeof on);
}

/* One read. Returns what recv() returned. */
static ssize_t read_some(Client *c) {
    memcpy(scratch, c->rest, c->rest_len);
    ssize_t n = recv(c->fd, scratch + c->rest_len, SCRATCH - c->rest_len, 0);
    if (n > 0) {
        wire_bytes += n;
        take(c, scratch, c->rest_len + n, now_ns());
    } else if (n == 0 || (errno != EAGAIN && errno != EINTR))
        ended(c);
    return n;
}

static void dial(Client *c, int port, const char *path, int deflate) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    struct timeval patience = {.tv_sec = 20};
    int on = 1, small = 4096, segment = 1400;
    char request[1024];
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    c->fd = socket(AF_INET, SOCK_STREAM, 0);
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    setsockopt(c->fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    if (c->stuck) {
        /* Else loopback, with its 64 KiB segments, swallows megabytes before anyone notices. */
        setsockopt(c->fd, SOL_SOCKET, SO_RCVBUF, &small, sizeof small);
        setsockopt(c->fd, IPPROTO_TCP, TCP_MAXSEG, &segment, sizeof segment);
    }
    if (connect(c->fd, (struct sockaddr *)&address, sizeof address)) die("connect");
    int n = snprintf(request, sizeof request,
                     "GET %s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nUpgrade: websocket\r\n"
                     "Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
                     "Sec-WebSocket-Key: c3dpZnRjbXMtYmVuY2ghIQ==\r\n%s\r\n", path, port,
                     deflate ? "Sec-WebSocket-Extensions: permessage-deflate; "
                               "client_max_window_bits\r\n" : "");
    acknowledge_at_once(c);
    if (send(c->fd, request, n, MSG_NOSIGNAL) != n) die("handshake");
    size_t have = 0;
    char *end = NULL;
    while (!end) {
        ssize_t got = recv(c->fd, scratch + have, 65536 - have, 0);
        if (got <= 0) die("handshake");
        scratch[have += got] = 0;
        end = strstr((char *)scratch, "\r\n\r\n");
    }
    *end = 0;
    if (!strstr((char *)scratch, " 101 ")) {
        fprintf(stderr, "loadclient: refused: %s\n", scratch);
        exit(1);
    }
    c->deflated = strcasestr((char *)scratch, "permessage-deflate") != NULL;
#ifdef WITH_ZLIB
    if (c->deflated && inflateInit2(&c->inflater, -15) != Z_OK) die("zlib");
#endif
    size_t used = (unsigned char *)end + 4 - scratch;
    take(c, scratch + used, have - used, now_ns());
}

static void greet(Client *c, const char *text, int repeat, long answers) {
    static long running;
    char filled[4096];
    for (int i = 0; text && i < repeat; i++, running++) {
        size_t n = 0;
        for (const char *p = text; *p && n < sizeof filled - 24; p++)
            n += *p == '#' ? (size_t)sprintf(filled + n, "%ld", running) : (filled[n] = *p, 1u);
        send_frame(c, TEXT, filled, n);
    }
    while (c->answers < answers) {
        acknowledge_at_once(c);
        if (read_some(c) <= 0 || !c->open) die("waiting for an answer");
    }
}

static int by_size(const void *a, const void *b) {
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

static void report(void) {
    long fewest = -1, most = 0, closed = 0, measured = 0;
    int close_code = 0;
    int64_t *latency = malloc(sizeof *latency * count);
    /* When it spins, what it did not wait; else the processor's time. */
    int64_t busy = !total ? 0 : spun_ns ? now_ns() - first_ns - spun_ns : cpu_ns() - cpu_at_first;
    for (Client *c = clients; c < clients + count; c++) {
        if (c->stuck) continue;
        if (fewest < 0 || c->frames < fewest) fewest = c->frames;
        if (c->frames > most) most = c->frames;
        closed += !c->open;
        if (c->close_code) close_code = c->close_code;
        if (expected == 1 && c->frames) latency[measured++] = c->latency_ns;
    }
    qsort(latency, measured, sizeof *latency, by_size);
    int64_t p50 = measured ? latency[measured / 2] : 0;
    int64_t p99 = measured ? latency[measured * 99 / 100] : 0;
    int64_t top = measured ? latency[measured - 1] : 0;
    say("{\"frames\": %ld, \"fewest\": %ld, \"most\": %ld, \"complete\": %ld, \"closed\": %ld, "
        "\"close_code\": %d, \"order_errors\": %ld, \"bad_frames\": %ld, \"unseen\": %ld, \"first_ns\": %lld, "
        "\"last_ns\": %lld, \"wire_bytes\": %lld, \"smallest\": %zu, \"largest\": %zu, "
        "\"busy_ns\": %lld, \"p50_ns\": %lld, \"p99_ns\": %lld, \"max_ns\": %lld}",
        total, fewest, most, complete, closed, close_code, order_errors, bad_frames,
        unseen, (long long)first_ns, (long long)last_ns, (long long)wire_bytes,
        total ? smallest : 0, largest, (long long)busy, (long long)p50, (long long)p99, (long long)top);
    free(latency);
    /* Errors seen while nothing was expected belong to the next report, so reset them only here. */
    expected = order_errors = bad_frames = unseen = 0;
}

/* Now reads what the stuck connection was sent, and says how that ended. */
static void report_stuck(void) {
    Client *c = clients;
    struct timeval patience = {.tv_sec = 1};
    const char *end = "open";
    ssize_t n = 1;
    setsockopt(c->fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    wire_bytes = 0;
    while (c->open && (n = read_some(c)) > 0) continue;
    if (c->close_code)
        end = "closed";
    else if (!c->open)
        end = n < 0 ? "reset" : "cut";
    say("{\"end\": \"%s\", \"code\": %d, \"bytes\": %lld, \"order_errors\": %ld}", end,
        c->close_code, (long long)wire_bytes, order_errors);
}

int main(int argc, char **argv) {
    const char *text = NULL;
    int repeat = 1, deflate = 0, stuck = 0, spin = 0, accepted = 0;
    long answers = 0;
    struct epoll_event ready[256], watch = {.events = EPOLLIN};
    if (argc < 4) return fputs("usage: loadclient PORT PATH COUNT [options]\n", stderr), 2;
    count = atoi(argv[3]);
    for (int i = 4; i < argc; i++) {
        if (!strcmp(argv[i], "--deflate")) deflate = 1;
        else if (!strcmp(argv[i], "--engineio")) engineio = 1;
        else if (!strcmp(argv[i], "--stuck")) stuck = 1;
        else if (!strcmp(argv[i], "--spin")) spin = 1;
        else if (i + 1 == argc) return fputs("loadclient: a value is missing\n", stderr), 2;
        else if (!strcmp(argv[i], "--send")) text = argv[++i];
        else if (!strcmp(argv[i], "--repeat")) repeat = atoi(argv[++i]);
        else if (!strcmp(argv[i], "--answers")) answers = atol(argv[++i]);
        else return fprintf(stderr, "loadclient: unknown %s\n", argv[i]), 2;
    }
    alarm(LIFETIME_S); /* never outlive a bench that was killed */
    clients = calloc(count, sizeof *clients);
    poller = epoll_create1(0);
    for (int i = 0; i < count; i++) {
        Client *c = clients + i;
        c->open = 1, c->last_seq = NO_SEQ, c->stuck = stuck && i == 0;
        c->rest = malloc(c->rest_size = 4096);
        dial(c, atoi(argv[1]), argv[2], deflate);
        greet(c, text, repeat, answers);
        accepted += c->deflated;
        if (c->stuck) continue;
        fcntl(c->fd, F_SETFL, O_NONBLOCK);
        watch.data.ptr = c;
        epoll_ctl(poller, EPOLL_CTL_ADD, c->fd, &watch);
        /* Connecting may take long: those already connected must answer the server's pings. */
        for (int n = epoll_wait(poller, ready, 256, 0); n > 0; n--) read_some(ready[n - 1].data.ptr);
    }
    watch.data.ptr = NULL; /* standard input */
    epoll_ctl(poller, EPOLL_CTL_ADD, 0, &watch);
#ifdef WITH_ZLIB
    say("{\"ready\": %d, \"deflated\": %d, \"inflates\": true}", count, accepted);
#else
    say("{\"ready\": %d, \"deflated\": %d, \"inflates\": false}", count, accepted);
#endif
    for (int64_t deadline = 0;;) {
        int64_t now = now_ns(), left = expected ? (deadline - now) / 1000000 : 1000;
        int n = epoll_wait(poller, ready, 256, left < 0 || (spin && expected) ? 0 : left);
        if (spin && expected && !n) spun_ns += now_ns() - now; /* waited, and not even slept */
        for (int i = 0; i < n; i++) {
            char line[256];
            Client *c = ready[i].data.ptr;
            if (c) {
                read_some(c);
                continue;
            }
            ssize_t got = read(0, line, sizeof line - 1); /* one command at a time is sent */
            if (got <= 0) return 0;
            line[got] = 0;
            long events, patience;
            if (sscanf(line, "expect %ld %ld", &events, &patience) == 2) {
                for (Client *each = clients; each < clients + count; each++) each->frames = 0;
                expected = events, total = complete = 0;
                wire_bytes = 0, smallest = SIZE_MAX, largest = 0, first_ns = last_ns = 0;
                deadline = now_ns() + patience * INT64_C(1000000);
                say("{\"armed\": 1}");
            } else if (!strncmp(line, "stuck", 5))
                report_stuck();
            else
                return 0;
        }
        if (expected && (complete == count - stuck || now_ns() >= deadline)) report();
    }
}
